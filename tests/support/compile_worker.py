"""Run by tests/kernels/test_choice.py without TRITON_INTERPRET: compiles every kernel's launches for GPUs not at hand.

Launches are caught: their arguments give the signature, nothing runs. Prints one JSON line: kernel -> variants. With
widths as arguments it compiles what handles a whole token, for Hopper: kernel and width -> [warps, bytes of the stack].
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ptp_ds.kernels
from ptp_ds.kernels import Sources, dual_divergence, noise, pack_embed, perturb_step, places_of

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
             torch.uint8: "*u8"}  # fmt: skip
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
compiled: dict[str, set[str]] = {}
stacks: dict[str, list[int]] = {}
capabilities, suffix = [80, 90], ""


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if abs(value) < 1 << 31 else "i64"


def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **given: object) -> None:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | given
    constants = {name: value for name, value in values.items() if name.isupper() and name in given}
    signature = {name: "constexpr" if name in constants else type_of(values[name]) for name in names}
    name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
    variant = f"{list(signature.values())} {constants}"
    if variant in compiled.setdefault(name, set()):
        return
    for capability in capabilities:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {name: given[name] for name in ("num_warps",) if name in given}
        found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert found.asm["cubin"], name
    compiled[name].add(variant)
    if suffix:
        stacks[f"{name} {suffix}"] = [found.metadata.num_warps, stack_of(found.asm["cubin"])]


def stack_of(cubin: bytes) -> int:
    """Bytes of each thread's stack: what its registers didn't hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", said)[-1])


def launch_wide(width: int) -> None:
    """Kernels of which one program handles a whole token."""
    global suffix
    lengths = torch.tensor([2, 1])
    owners = torch.repeat_interleave(torch.arange(2), lengths)
    places = places_of(torch.ones(3, dtype=torch.bool), owners, torch.arange(2), torch.arange(3))
    for kind in ("normal", "uniform"):
        suffix = f"{kind} {width}"
        noise(kind, 1 << 40, 2, places, width, 0.5, norm="token_l2", impl="triton")
    delta = torch.zeros(3, width)
    for dtype in (torch.bfloat16, torch.float32):
        rows, suffix = delta.to(dtype), f"{dtype} {width}"
        how = {"norm": "token_l2", "radius": 0.5, "length": 0.5}
        perturb_step(delta, rows, places, embeds_TH=rows, impl="triton", **how)


def launch_all(dtype: torch.dtype) -> None:
    width = 48
    lengths = torch.tensor([5, 1, 9])
    tokens = int(lengths.sum())
    movable, owners = torch.ones(tokens, dtype=torch.bool), torch.repeat_interleave(torch.arange(3), lengths)
    plain = places_of(movable, owners, torch.arange(3))
    repeated = places_of(movable, owners, torch.arange(3), torch.arange(tokens))
    delta, rows = torch.zeros(tokens, width), torch.zeros(tokens, width, dtype=dtype)
    for kind in ("normal", "uniform"):
        for norm in (None, "frobenius", "token_l2"):
            noise(kind, 1 << 40, 2, plain, width, 0.5, norm=norm, impl="triton")
    for norm in ("frobenius", "token_l2", "linf"):
        for places in (plain, repeated):
            for embeds in (rows, None):
                perturb_step(delta, rows, places, norm=norm, radius=0.5, length=0.5, embeds_TH=embeds, impl="triton")
    prompt = rows[:4].clone().requires_grad_()
    free = delta.clone().requires_grad_()
    sources = Sources(torch.arange(tokens) - 4, torch.arange(tokens))
    pack_embed(rows, prompt, Sources(sources.ids), impl="triton")
    out = pack_embed(rows, prompt, sources, free, impl="triton")
    torch.autograd.grad(out, (prompt, free), torch.zeros_like(out))
    scores = torch.zeros(3, 5, dtype=dtype)
    for kind in ("kl", "sym_kl", "js", "ce"):
        dual_divergence(scores, scores, torch.zeros(3, dtype=torch.int64), kind, reg_weight=0.5, impl="triton")


def main() -> None:
    JITFunction.run = compile_only
    for name in ("noise", "perturb_step", "pack_embed", "dual_divergence"):
        sys.modules[f"{ptp_ds.kernels.__name__}.{name}"].use_triton = lambda impl, *tensors: True
    if sys.argv[1:]:
        capabilities[:] = [90]
        for width in sys.argv[1:]:
            launch_wide(int(width))
        print(json.dumps(stacks), flush=True)
        return
    for dtype in (torch.bfloat16, torch.float32):
        launch_all(dtype)
    print(json.dumps({name: len(variants) for name, variants in compiled.items()}), flush=True)


if __name__ == "__main__":
    main()
