"""Precision: what is computed in which dtype, decided here and nowhere else.

what                                                dtype
the backbone: weights, activations, the packed row  --precision: fp32, bf16 or fp16
the prompt as the backbone sees it                  the backbone's
the prompt itself, AdamW's state                    fp32 (DeepSpeed's master weights)
delta, its norms, steps and projections             fp32, added to the embeddings and rounded once
attention's log-sum-exps and sums over rows         fp32
logits of verbalizers, scores, losses               fp32
loss scaling                                        DeepSpeed's dynamic one, under fp16 alone; ascents' losses too

Frozen weights in fp8 or int8 are left to DeepSpeed's own quantised gathers (a ds_config's zero_quantized_* keys).
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.files import brief

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_OF = {dtype: name for name, dtype in _DTYPES.items()}
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # oneDNN's names
_CLOSE = 5e-3


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def native_bf16() -> tuple[bool, str]:
    """(whether this hardware multiplies bf16 matrices natively, the reason in words)."""
    if not torch.cuda.is_available():
        return _processors_bf16(os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "")
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True, f"{name} computes bf16 natively"
    return False, f"{name} has no native bf16"


@cache
def _processors_bf16(most: str) -> tuple[bool, str]:
    """native_bf16 without a GPU. most: what oneDNN, whose products these are, may use of the processor; "" for all."""
    can = torch.cpu.get_capabilities()
    has = [text for name, text in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if can.get(name)]
    if not has:
        return False, "no GPU here; this processor has no bf16 products, neither AVX512-BF16 nor AMX"
    if most.upper() in _WITHOUT_BF16:
        return False, f"no GPU here; oneDNN's bf16 products are turned off by ONEDNN_MAX_CPU_ISA={most}"
    if not torch.backends.mkldnn.is_available():
        return False, f"no GPU here; the processor has {has[0]}, but this torch has no oneDNN"
    error = _error_of_products()
    if not error <= _CLOSE:
        return False, f"no GPU here; bf16 products by {has[0]} differ from fp32 ones by {error:.0e}"
    return True, f"no GPU here; the processor multiplies bf16 by {has[0]}"


def _error_of_products() -> float:
    """Relative l2 distance of a bf16 product from the fp32 one of the same numbers; rounding it makes 2e-3."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x, weight = (torch.randn(256, 256, generator=generator).to(torch.bfloat16) for _ in range(2))
    wanted = x.float() @ weight.float()
    return float((torch.mm(x, weight).float() - wanted).norm() / wanted.norm())


def dtype_of(precision: str, where: str = "") -> torch.dtype:
    """The backbone's dtype for one of PRECISIONS, without a DeepSpeed configuration.

    ValueError for another name, and for fp16 on a CPU; this begins with `where`, what asks for it where the flag
    doesn't.
    """
    if precision == "auto":
        return torch.bfloat16 if native_bf16()[0] else torch.float32
    if precision not in _DTYPES:
        raise UserError(f"precision is {brief(precision)}; choose from auto, {', '.join(_DTYPES)}.")
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError(f"{where}fp16 needs a GPU: DeepSpeed has no fp16 on a CPU; use --precision fp32.")
    return _DTYPES[precision]


def enabled(config: dict[str, Any], block: str) -> Any:
    """A DeepSpeed block's "enabled": true, false or "auto"; a missing fp16 block leaves the choice open."""
    return config.get(block, {"enabled": "auto"} if block == "fp16" else {}).get("enabled", False)


def resolve_precision(config: dict[str, Any], wanted: str, file: str) -> tuple[torch.dtype, str]:
    """(the backbone's dtype, the line that explains it, "" where the file does), `config`'s blocks set to match.

    Raises ValueError where the blocks contradict each other or `wanted`, and for fp16 without a GPU.
    """
    given = {block: enabled(config, block) for block in ("bf16", "fp16")}
    if all(on is True for on in given.values()):
        raise UserError(f"{file} enables both bf16 and fp16; choose one.")
    for block, on in given.items():
        if wanted != "auto" and on != "auto" and on != (wanted == block):
            raise UserError(
                f"{file} says {block}.enabled = {str(on).lower()}, but --precision is {wanted}; "
                'set it to "auto" or leave --precision out.'
            )
    name, reason = _choose(given, wanted)
    dtype = dtype_of(name, f"{file}: " if wanted == "auto" else "")
    for block in given:
        if block in ("bf16", name) or block in config:
            config[block] = {**config.get(block, {}), "enabled": name == block}
    return dtype, f"precision = {name} ({reason})" if reason else ""


def _choose(given: dict[str, Any], wanted: str) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "--precision"
    for block, on in given.items():
        if on is True:
            return block, ""
    if given["bf16"] is False:
        return "fp32", ""
    native, reason = native_bf16()
    return ("bf16" if native else "fp32"), reason
