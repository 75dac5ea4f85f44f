"""Loading a frozen backbone: whole under ZeRO-2, sharded tensor by tensor under ZeRO-3."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import Backbone, decoder_layers
from ptp_ds.backbone.heads import Head, HeadPlan, auto_class, is_trained, may_be_absent
from ptp_ds.backbone.sharding import send_as_int8
from ptp_ds.backbone.source import load_config
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, plain_name, read_json
from ptp_ds.ranks.distributed import Ranks


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """config: what DeepSpeed gets. notes: one line for each resolved "auto". dtype: the backbone's."""

    config: dict[str, Any]
    notes: list[str]
    dtype: torch.dtype

    @property
    def stage(self) -> int:
        return int(self.config["zero_optimization"]["stage"])


def load_backbone(
    folder: Path, deepspeed_config: ResolvedDeepSpeed, ranks: Ranks, plan: HeadPlan | None = None,
    kernels: str = "auto",
) -> Backbone:  # fmt: skip
    """The frozen backbone on this rank's device, in the resolved dtype; sharded over ranks under ZeRO-3.

    plan: the head it predicts with, a causal one by default. Tensors that a checkpoint lacks are refused, but for those
    of a classifier, which is trained. kernels: see ptp_ds.kernels.
    """
    plan, config = plan or HeadPlan(), load_config(folder)
    files = _tensor_files(folder)
    auto = auto_class(config, plan.kind, folder)
    if plan.kind == "classes":
        config.num_labels = plan.outputs
    model: Any
    if deepspeed_config.stage != 3:
        with _transformers_refusals(folder):
            model, info = auto.from_pretrained(
                folder, config=config, dtype=deepspeed_config.dtype, output_loading_info=True, use_safetensors=True,
                trust_remote_code=False, ignore_mismatched_sizes=plan.kind == "classes",
            )  # fmt: skip
        absent = set(info["missing_keys"])
        _refuse_absent(absent, plan, folder)
        model = model.to(ranks.device)
    else:
        with _transformers_refusals(folder):
            model = build_sharded(config, deepspeed_config, auto)
        absent = _fill_from_files(model, folder, files, ranks, plan)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    trained = {name: shape for name, shape in shapes.items() if is_trained(name) or name in absent}
    head = Head(plan.kind, plan.choice, trained if plan.kind == "classes" else {})
    return Backbone(model, head=head, kernels=kernels)


_UNFIT = ("Error(s) in loading state_dict", "You set `ignore_mismatched_sizes`", "We encountered some issues during")


@contextmanager
def _transformers_refusals(folder: Path) -> Iterator[None]:
    """What transformers raises for a folder's config.json (a width that heads don't divide), or for weights that don't
    fit it, is for the user."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not said.startswith(_UNFIT):
            raise
        shown = brief(said)[1:-1].rstrip(".")
        raise UserError(
            f"{folder}: transformers can't build the model that config.json describes ({shown})."
        ) from error


def _refuse_absent(absent: set[str], plan: HeadPlan, folder: Path) -> None:
    """ValueError where the files lack tensors that nothing here trains."""
    missing = sorted(name for name in absent if plan.kind != "classes" or not may_be_absent(name))
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]!r} and {len(missing) - 1} more of a {plan.kind} model; choose another "
            "--head, or, where only the names differ, load it once with transformers, save its state dict under the "
            "module's names, and give that folder."
        )


def build_sharded(config: Any, deepspeed_config: ResolvedDeepSpeed, auto: Any = AutoModelForCausalLM) -> Any:
    """The model with its parameters partitioned as they are made, values unset: no rank holds more than a tensor."""
    import deepspeed
    from transformers.initialization import no_init_weights

    pad, config.pad_token_id = config.pad_token_id, None  # transformers would zero a row of a sharded embedding
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config.config):
        model = auto.from_config(config)
    model.tie_weights()  # no_init_weights leaves this out
    for module in model.modules():  # roberta's positions are counted from its padding's
        if hasattr(module, "padding_idx") and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            module.padding_idx = module.position_embeddings.padding_idx = pad
    config.pad_token_id = pad
    if deepspeed_config.config["zero_optimization"].get("zero_quantized_weights"):
        send_as_int8(decoder_layers(model))
    dtypes = {parameter.dtype for parameter in model.parameters()}  # a shard on NVMe has none in memory
    assert dtypes == {deepspeed_config.dtype}, f"zero.Init built {dtypes}, wanted {deepspeed_config.dtype}"
    return model


@torch.no_grad()
def fill_randomly(model: Any, deviation: float = 0.02) -> None:
    """Random weights for a sharded model, each rank its own partition: for benchmarks, not for results."""
    for name, parameter in model.named_parameters():
        if len(parameter.ds_shape) == 1:
            parameter.ds_tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.ds_tensor.normal_(0.0, deviation)
        if parameter.ds_secondary_tensor is not None:  # hpZ's copy, made anew from the shards
            parameter.ds_secondary_tensor = None
            parameter.all_gather()
            parameter.partition(has_been_updated=True)


def _opened(file: Path) -> Any:
    """safetensors' handle on one of a model's files; ValueError where it is damaged or absent."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: the safetensors file is damaged ({brief(str(error))[1:-1]}).") from None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensors and their files, all safetensors within the folder. ValueError for an adapter's folder, for weights in
    pickle files and for an index that leads elsewhere."""
    if os.path.lexists(folder / "adapter_config.json"):  # transformers would load it, and the model that it names
        raise UserError(f"{folder} holds adapter_config.json; give a folder of a whole model, the adapter elsewhere.")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if is_file(single):  # transformers prefers it, too
        return dict.fromkeys(_opened(single).keys(), single)
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
    """Numbers in the folder's weight files, by their headers. Raises UserError where load_backbone would, too."""
    files, total = _tensor_files(folder), 0
    for file in sorted(set(files.values())):
        with _opened(file) as handle:
            names = handle.keys()
            total += sum(math.prod(handle.get_slice(name).get_shape()) for name in names)
    return total


def _stored_name(name: str, files: dict[str, Path], prefix: str) -> str | None:
    """The file's name of a parameter: as it is, with or without the family's base prefix (gpt2's files lack it), or
    with the first BERT's names of a norm's weight and bias."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for spelled in dict.fromkeys((name, old)):
        for candidate in (spelled, spelled.removeprefix(f"{prefix}."), f"{prefix}.{spelled}"):
            if candidate in files:
                return candidate
    return None


@torch.no_grad()
def _fill_from_files(model: Any, folder: Path, files: dict[str, Path], ranks: Ranks, plan: HeadPlan) -> set[str]:
    """Fills every rank's part of the parameters; returns the names of those that the files lack."""
    import deepspeed

    names = {name: _stored_name(name, files, model.base_model_prefix) for name, _ in model.named_parameters()}
    absent = {name for name, stored in names.items() if stored is None}
    _refuse_absent(absent, plan, folder)
    unread = {name for name in names if name in absent or (plan.kind == "classes" and is_trained(name))}
    filled = {name: p for name, p in model.named_parameters() if name not in unread}
    handles = {file: _opened(file) for file in set(files.values())}
    tensors = {name: handles[files[stored]].get_slice(stored) for name, stored in names.items() if stored is not None}
    for name, parameter in filled.items():  # on all ranks, before any of them waits for another
        found, wanted = tuple(tensors[name].get_shape()), tuple(parameter.ds_shape)
        if found != wanted:
            raise UserError(f"{folder}: {names[name]} has shape {found}, its config.json says {wanted}.")
    for name, parameter in filled.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if ranks.is_main:
                parameter.copy_(tensors[name][...])
    return absent
