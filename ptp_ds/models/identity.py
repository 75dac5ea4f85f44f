"""What a model is, wherever its folder lies: its family and sizes, its weights by a sample, its config.json by a hash.

A folder may be moved, downloaded under its hub id, cut into other files, or get its config.json written anew: it stays
the same model. Weights that were trained further are another model's, whatever their shapes, and so are those in
another dtype.
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ptp_ds.errors import UserError
from ptp_ds.files import brief, sha256_of
from ptp_ds.models.stored import tensor_files

_SAMPLED = 512  # tensors; those of up to some 15 billion parameters, all of them
SIZES = {
    "family": "family",
    "width": "width",
    "layers": "number of layers",
    "vocabulary": "vocabulary's size",
}  # in words


def model_identity(folder: Path, config: Any) -> dict[str, Any]:
    """SIZES, weights_sha256 and config_sha256 of a model's folder, as plain data. config: transformers' own.

    Raises ValueError for files that can't be read.
    """
    return {
        **model_sizes(config), "weights_sha256": weights_sample(folder),
        "config_sha256": sha256_of(folder / "config.json"),
    }  # fmt: skip


def model_sizes(config: Any) -> dict[str, Any]:
    """The identity's part that a configuration tells."""
    text = config.get_text_config()
    return {
        "family": config.model_type, "width": text.hidden_size,
        "layers": getattr(text, "num_hidden_layers", None), "vocabulary": getattr(text, "vocab_size", None),
    }  # fmt: skip


def weights_sample(folder: Path) -> str:
    """Hex sha256 over every tensor's name, and dtype, shape and first, middle and last row of _SAMPLED of them.

    Which are sampled follows from the names alone, whatever files hold them.
    """
    files = tensor_files(folder)
    names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    digest = hashlib.sha256("\n".join(names).encode())
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for name in names[:_SAMPLED]:
            file = files[name]
            try:
                if file not in handles:
                    handles[file] = stack.enter_context(safe_open(file, framework="pt"))
                digest.update(_sample(handles[file], name))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: the safetensors file is damaged ({brief(str(error))[1:-1]}).") from None
    return digest.hexdigest()


def _sample(handle: Any, name: str) -> bytes:
    part = handle.get_slice(name)
    shape = tuple(part.get_shape())
    found = f"{name} {part.get_dtype()} {shape}".encode()
    if 0 in shape:
        return found
    if len(shape) < 2:
        return found + _bytes(handle.get_tensor(name))
    for row in sorted({0, shape[0] // 2, shape[0] - 1}):
        found += _bytes(part[(slice(row, row + 1), *(slice(0, 1) for _ in shape[1:-1]))])
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What keeps two models from being the same one, in words; empty where nothing does or nothing is known.

    theirs: a model_identity, or as much of one as a record holds.
    """
    for name, words in SIZES.items():
        if theirs.get(name) is not None and theirs[name] != ours[name]:
            return f"its {words} is {brief(ours[name], 40)}, not {brief(theirs[name], 40)}"
    if theirs.get("weights_sha256") not in (None, ours["weights_sha256"]):
        return "its weights are others"
    return ""
