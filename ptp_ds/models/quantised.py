"""Quantised checkpoints are refused: nothing here applies their scales, so what lies in their files are no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.models.stored import opened

_REMEDY = (
    "quantised weights are not read. Give the model's own weights in half precision, or dequantise them first "
    "(docs/deepspeed_configs.md, Which precision, has the lines)."
)
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; its other floats have 8 bits or fewer
_SCALES = ("_scale", "_scales", "_scale_inv")  # behind the name of the weight that they scale


def require_plain_config(config: Any, where: str) -> None:
    """UserError where a configuration, or one inside it, says that the weights are quantised. where: what holds it."""
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {})))
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise UserError(f"{where} holds quantization_config: {_REMEDY}")


def require_plain_tensors(files: Mapping[str, Path]) -> None:
    """UserError where a weight is stored in other numbers than floats of 16 bits or more, or with a scale beside it,
    whatever the configuration says. files: each tensor's file; their headers alone are read."""
    for file in sorted(set(files.values())):
        handle = opened(file)
        for name in handle.keys():  # noqa: SIM118
            is_weight, dtype = name.endswith("weight"), handle.get_slice(name).get_dtype()
            if dtype not in _FLOATS and (is_weight or dtype.startswith("F")):
                raise UserError(f"{file}: {name} is stored as {dtype}: {_REMEDY}")
            scale = next((name + ending for ending in _SCALES if name + ending in files), None)
            if is_weight and scale is not None:
                raise UserError(f"{file}: {name} is stored beside {scale}: {_REMEDY}")
