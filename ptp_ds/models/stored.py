"""A model's tensors in its files, under the names and in the shapes that the module has.

Families store some of their tensors otherwise: under older names, experts one by one, projections split. transformers
knows how, by its conversion mapping; what is read here goes through it, one tensor (or one layer's experts) at a time.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, plain_name, read_json


def opened(file: Path) -> Any:
    """safetensors' handle on one of a model's files; ValueError where it is damaged or absent."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: the safetensors file is damaged ({brief(str(error))[1:-1]}).") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensors and their files, all safetensors within the folder. ValueError for an adapter's folder, for weights in
    pickle files and for an index that leads elsewhere."""
    if os.path.lexists(folder / "adapter_config.json"):  # transformers would load it, and the model that it names
        raise UserError(f"{folder} holds adapter_config.json; give a folder of a whole model, the adapter elsewhere.")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if is_file(single):  # transformers prefers it, too
        return dict.fromkeys(opened(single).keys(), single)
    if not is_file(index):
        raise UserError(
            f"{folder} holds no model.safetensors; save the model with save_pretrained first (pickle files are never "
            "loaded)."
        )
    read = read_json(index, str(index))
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; save the model with save_pretrained.")
    for name in dict.fromkeys(map(str, weight_map.values())):
        if not plain_name(name, f"{index}: a file's name").endswith(".safetensors"):
            raise UserError(f"{index} names {brief(name)}; only .safetensors files are loaded.")
    return {name: folder / file for name, file in weight_map.items()}


def stored_numbers(folder: Path) -> int:
    """Numbers in the folder's weight files, by their headers. Raises UserError where tensor_files does."""
    total = 0
    for file in sorted(set(tensor_files(folder).values())):
        with opened(file) as handle:
            names = handle.keys()
            total += sum(math.prod(handle.get_slice(name).get_shape()) for name in names)
    return total


@dataclass
class _Group:
    """Tensors of the files that become one or several of the model's. sources: (pattern, the file's name), in order."""

    transform: Any
    first: str
    sources: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, model: nn.Module, read: Any) -> dict[str, Tensor]:
        """The model's tensors by name; read(name) gives one of the files'."""
        transform = deepcopy(self.transform)
        for pattern, stored in self.sources:
            transform.add_tensor(self.first, stored, pattern, lambda stored=stored: read(stored))
        found = transform.convert(self.first, model=model, config=model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in found.items()}


class StoredTensors:
    """What the files hold of a model's parameters and persistent buffers. files: each tensor's file.

    shapes: by the model's names, without reading values: what the conversions make of tensors on the meta device.
    """

    def __init__(self, model: Any, files: Mapping[str, Path]) -> None:
        self.model = model
        self._handles = {file: opened(file) for file in sorted(set(files.values()))}
        self._files = files
        self._groups = self._grouped()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._targets: dict[str, list[str]] = {}
        for first, group in self._groups.items():
            made = group.convert(model, self._meta)
            self._targets[first] = list(made)
            self.shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}

    def _grouped(self) -> dict[str, _Group]:
        """Groups by the first name that each makes, in the order of the files' names."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        wanted, prefix = self.model.state_dict(), self.model.base_model_prefix
        groups: dict[str, _Group] = {}
        for stored in sorted(self._files, key=_natural):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
            if name not in wanted and stored in wanted:  # a name that needed no change but, maybe, the prefix
                name, pattern = rename_source_key(stored, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
            if name not in wanted:
                continue
            transform = of_pattern[pattern] if pattern is not None else WeightRenaming(stored, name)
            group = groups.setdefault(name, _Group(transform, name))
            group.sources.append((pattern if pattern is not None else stored, stored))
        return groups

    def _meta(self, stored: str) -> Tensor:
        part = self._handles[self._files[stored]].get_slice(stored)
        return torch.empty(part.get_shape(), device="meta")

    def _read(self, stored: str) -> Tensor:
        return self._handles[self._files[stored]].get_tensor(stored)

    def where(self, name: str) -> str:
        """The file and its tensors that become a model's tensor, for a message."""
        group = next(group for first, group in self._groups.items() if name in self._targets[first])
        stored = group.sources[0][1]
        return f"{self._files[stored]}: {stored}"

    def equal(self, name: str, other: str) -> bool:
        """Whether two of the model's tensors have the same values in the files."""
        first, second = (values()[one] for one in (name, other) for _, values in self.groups([one]))
        dtype = torch.promote_types(first.dtype, second.dtype)
        return torch.equal(first.to(dtype), second.to(dtype))

    def groups(self, wanted: Collection[str]) -> Iterator[tuple[list[str], Callable[[], dict[str, Tensor]]]]:
        """(the model's names, a function that reads their values) of each group that makes a wanted name, in order."""
        for first, group in self._groups.items():
            names = [name for name in self._targets[first] if name in wanted]
            if names:
                yield names, partial(group.convert, self.model, self._read)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that takes numbers as numbers: experts in their order."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in name.split(".")]
