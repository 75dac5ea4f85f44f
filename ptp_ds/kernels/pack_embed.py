"""The packed row's input embeddings in one pass: token embeddings, prompt rows and deltas, gathered and added.

    out[n] = table[ids[n]]                 for ids[n] >= 0: a frozen token embedding
    out[n] = prompt[-ids[n] - 1]           for ids[n] < 0
    out[n] += delta[delta_of[n]]           for delta_of[n] >= 0

The sum is rounded once, to the table's dtype. Backward: fp32 sums of the rows that took each prompt row and each delta.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_ds.kernels.choice import block_of, jit, tl, use_triton
from ptp_ds.kernels.places import add_at


@dataclass(frozen=True)
class Sources:
    """ids [N]: see the module's formula. delta_of [N], or None where nothing takes a delta. All int64."""

    ids: Tensor
    delta_of: Tensor | None = None


def pack_embed(
    table_VH: Tensor, prompt_PH: Tensor, sources: Sources, delta_SH: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """[N, H] in the table's dtype, with gradient to the prompt and to delta, none to the table."""
    delta_of = sources.delta_of if delta_SH is not None else None
    return _PackEmbed.apply(table_VH, prompt_PH, sources.ids, delta_SH, delta_of, impl)


def sum_rows(rows_NH: Tensor, target_N: Tensor, count: int, *, impl: str = "auto") -> Tensor:
    """[count, H] sums, in fp32 or better, of the rows with each target; negative targets count nowhere.

    Additions are made in one order, so the result is the same every time (on a CPU, or by the kernel).
    """
    return (_sum_rows_triton if use_triton(impl, rows_NH) else _sum_rows_torch)(rows_NH, target_N, count)


class _PackEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, prompt, ids, delta, delta_of, impl):  # type: ignore[override]
        given = [table, prompt] if delta is None else [table, prompt, delta]
        ctx.kernel = use_triton(impl, *given)
        ctx.save_for_backward(ids, delta_of)
        ctx.rows = prompt.shape[0], 0 if delta is None else delta.shape[0]
        ctx.dtypes = prompt.dtype, None if delta is None else delta.dtype
        forward = _forward_triton if ctx.kernel else _forward_torch
        return forward(table.detach(), prompt.detach(), ids, None if delta is None else delta.detach(), delta_of)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        ids, delta_of = ctx.saved_tensors
        impl = "triton" if ctx.kernel else "torch"
        to_prompt = to_delta = None
        if ctx.needs_input_grad[1]:
            to_prompt = sum_rows(grad, -ids - 1, ctx.rows[0], impl=impl).to(ctx.dtypes[0])
        if ctx.needs_input_grad[3] and delta_of is not None:
            to_delta = sum_rows(grad, delta_of, ctx.rows[1], impl=impl).to(ctx.dtypes[1])
        return None, to_prompt, None, to_delta, None, None


def _forward_torch(table: Tensor, prompt: Tensor, ids: Tensor, delta: Tensor | None, delta_of: Tensor | None) -> Tensor:
    out = table.index_select(0, ids.clamp_min(0))
    if prompt.shape[0]:
        own = prompt.index_select(0, (-ids - 1).clamp_min(0)).to(out.dtype)
        out = torch.where(ids[:, None] < 0, own, out)
    if delta is not None and delta_of is not None:
        taken = delta.index_select(0, delta_of.clamp_min(0))
        out = torch.where(delta_of[:, None] >= 0, (out + taken).to(out.dtype), out)
    return out


def _sum_rows_torch(grad: Tensor, target: Tensor, count: int) -> Tensor:
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    sums, places = grad.new_zeros(count + 1, grad.shape[1]), torch.where(target < 0, count, target)
    return add_at(sums, places, grad)[:count]


@jit
def _gather_kernel(
    table,  # [V, H]
    prompt,  # [P, H]
    ids,  # [N]
    delta,  # [S, H], or unused
    delta_of,  # [N], or unused
    out,  # [N, H]
    H, DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    number = tl.load(ids + row)
    from_table = number >= 0
    x = tl.load(table + number * H + columns, mask=inside & from_table, other=0.0).to(tl.float32)
    p = tl.load(prompt + (-number - 1) * H + columns, mask=inside & (number < 0), other=0.0).to(tl.float32)
    x = tl.where(from_table, x, p)
    if DELTA:
        taken = tl.load(delta_of + row)
        x += tl.load(delta + taken * H + columns, mask=inside & (taken >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * H + columns, x.to(out.dtype.element_ty), mask=inside)


@jit
def _sum_rows_kernel(
    grad,  # [N, H]
    order,  # [N] rows of grad, sorted by target
    starts,  # [count + 1] where each target's rows begin in order
    out,  # [count, H] fp32
    H, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum of grad[order[starts[t] : starts[t + 1]]], always in the same order."""
    target = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(starts + target), tl.load(starts + target + 1)):
        row = tl.load(order + place)
        total += tl.load(grad + row * H + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target * H + columns, total, mask=inside)


def _forward_triton(
    table: Tensor, prompt: Tensor, ids: Tensor, delta: Tensor | None, delta_of: Tensor | None
) -> Tensor:
    table, prompt = table.contiguous(), prompt.contiguous()
    width = table.shape[1]
    out = table.new_empty(ids.shape[0], width)
    takes = delta is not None and delta_of is not None
    block = block_of(width, 1024)
    if ids.shape[0]:
        _gather_kernel[ids.shape[0], -(-width // block)](
            table, prompt, ids, delta.contiguous() if takes and delta is not None else table,
            delta_of if takes else ids, out, width, DELTA=takes, BLOCK=block,
        )  # fmt: skip
    return out


def _sum_rows_triton(grad: Tensor, target: Tensor, count: int) -> Tensor:
    grad, width = grad.contiguous(), grad.shape[1]
    out = torch.empty(count, width, device=grad.device)
    order = torch.argsort(target, stable=True)
    starts = torch.searchsorted(target[order], torch.arange(count + 1, device=grad.device))
    block = block_of(width, 1024)
    if count:
        _sum_rows_kernel[count, -(-width // block)](grad, order, starts, out, width, BLOCK=block)
    return out
