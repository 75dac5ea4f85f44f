"""Attention over the tree on a GPU: flash kernels over ragged sequences, the parts joined by their log-sum-exps.

A query sees the prefix, the segments above its own, and its own segment up to itself. Each of these is one call of
torch's variable-length flash kernel (FlashAttention-2, Dao 2023) without padding or masks: all segments against
themselves, all against their parents, their grandparents, ..., and runs of queries against their prefix
(a population's rows stand on several). The backward of each part is that of ordinary attention with the joined output
and log-sum-exp.

Half precision only. Before it is used it is tried against the reference on the device itself (`try_flash`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ptp_ds.attention.backends import in_one_order
from ptp_ds.attention.plan import ForestPlan, Plan, plan_forest, plan_tree
from ptp_ds.kernels.places import add_at
from ptp_ds.packing.row import Block
from ptp_ds.packing.transfer import Move, moved
from ptp_ds.precision import at_least_fp32
from ptp_ds.ranks.log import ANY_RANK, get_logger

log = get_logger(__name__)

_DTYPES = (torch.bfloat16, torch.float16)
_MOST_WIDTH = 256  # of a head
_PREFIX_RUN = 1024  # queries that share a copy of the prefix's keys: the kernel's backward works run by run
_proven: dict[tuple[torch.device, torch.dtype], bool] = {}


@dataclass(frozen=True)
class Part:
    """Sequences of queries against sequences of keys. queries, keys: places in the row, None for all in order.

    cu_q, cu_k: [sequences + 1] int32 sums of their lengths. max_q, max_k: the longest. repeats: times that all keys are
    repeated, as where runs of queries share one prefix.
    """

    queries: Tensor | None
    keys: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    repeats: int = 1

    def mapped(self, move: Move) -> "Part":
        """See Movable."""
        queries, keys = (None if places is None else move(places) for places in (self.queries, self.keys))
        return replace(self, queries=queries, keys=keys, cu_q=move(self.cu_q), cu_k=move(self.cu_k))


def _part(pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, gathered: bool, causal: bool) -> Part:
    """pairs: for each sequence the places of its queries and of its keys."""
    sizes = [np.array([len(places) for places in side]) for side in zip(*pairs, strict=True)]
    cu_q, cu_k = (torch.from_numpy(np.concatenate([[0], np.cumsum(s)]).astype(np.int32)) for s in sizes)
    queries, keys = (torch.from_numpy(np.concatenate(side)) for side in zip(*pairs, strict=True))
    max_q, max_k = (int(size.max()) for size in sizes)
    return Part(queries if gathered else None, keys if gathered else None, cu_q, cu_k, max_q, max_k, causal)


def parts_of(blocks: Sequence[Block]) -> list[Part]:
    """The row's own parts, on the host: segments against themselves, then against each distance of ancestors."""
    own: list[tuple[np.ndarray, np.ndarray]] = []
    above: dict[int, dict[tuple[int, int], list[np.ndarray]]] = {}
    segments: dict[tuple[int, int], np.ndarray] = {}
    start = 0
    for number, block in enumerate(blocks):
        ends = (*block.starts[1:], block.length)
        for segment, (first, end) in enumerate(zip(block.starts, ends, strict=True)):
            places = np.arange(start + first, start + end)
            segments[number, segment] = places
            own.append((places, places))
            distance, parent = 1, block.parents[segment]
            while parent >= 0:
                above.setdefault(distance, {}).setdefault((number, parent), []).append(places)
                distance, parent = distance + 1, block.parents[parent]
        start += block.length
    parts = [_part(own, gathered=False, causal=blocks[0].causal)]
    for asked in above.values():
        pairs = [(np.concatenate(queries), segments[key]) for key, queries in asked.items()]
        parts.append(_part(pairs, gathered=True, causal=False))
    return parts


def prefix_part(tokens: Sequence[int], prefixes: Sequence[int], lengths: Sequence[int]) -> Part:
    """All queries in runs, each against a copy of its prefix's keys; on the host.

    tokens: queries of each tree; prefixes: the number of its prefix. lengths: keys of every prefix, which lie one
    behind the other.
    """
    asking: list[int] = []
    seen: list[int] = []
    for count, prefix in zip(tokens, prefixes, strict=True):
        runs = [min(_PREFIX_RUN, count - start) for start in range(0, count, _PREFIX_RUN)]
        asking += runs
        seen += [prefix] * len(runs)
    keys = None
    if len(lengths) > 1 and seen != list(range(len(lengths))):
        starts = np.cumsum([0, *lengths])
        keys = torch.from_numpy(np.concatenate([np.arange(starts[n], starts[n] + lengths[n]) for n in seen]))
    sizes = [lengths[number] for number in seen]
    cu_q, cu_k = (torch.from_numpy(np.cumsum([0, *each]).astype(np.int32)) for each in (asking, sizes))
    repeats = len(seen) if len(lengths) == 1 else 1
    return Part(None, keys, cu_q, cu_k, max(asking), max(sizes), causal=False, repeats=repeats)


def flash_forward(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(output [T, heads, d], log-sum-exp [heads, T] in fp32) of one part's sequences."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q_THD, k_TKD, v_TKD, part.cu_q, part.cu_k, part.max_q, part.max_k, 0.0, part.causal, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one part, given the joined output and log-sum-exp; in every run the same, to the bit.

    Else the kernel adds up a query's gradient from runs of keys as they come, by atomics.
    """
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    with in_one_order():
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, part.cu_q, part.cu_k, part.max_q, part.max_k, 0.0, part.causal, no_dropout, unused,
            scale=scale,
        )  # fmt: skip


def _copies(x: Tensor, part: Part) -> Tensor:
    """The prefixes' rows [P, ...] as the part's sequences of keys."""
    return x.repeat(part.repeats, 1, 1) if part.repeats > 1 else _of(x, part.keys)


def _from_copies(grad: Tensor, part: Part, rows: int) -> Tensor:
    """The transpose of _copies, summed in fp32."""
    if part.repeats > 1:
        return grad.unflatten(0, (part.repeats, -1)).sum(0, dtype=torch.float32).to(grad.dtype)
    if part.keys is None:
        return grad
    sums = torch.zeros(rows, *grad.shape[1:], dtype=torch.float32, device=grad.device)
    return add_at(sums, part.keys, grad.to(sums.dtype)).to(grad.dtype)


def _of(x: Tensor, places: Tensor | None, axis: int = 0) -> Tensor:
    return x if places is None else x.index_select(axis, places)


class FlashTreeAttention(torch.autograd.Function):
    """[T, heads, d] queries, [T, key heads, d] keys and values, prefixes [P, key heads, d] -> [T, heads, d].

    parts: the prefix's (prefix_part), then the row's own (parts_of); made once a plan.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_prefix, v_prefix, parts, scale):  # type: ignore[override]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        prefix, *parts = parts
        out_prefix, lse = flash_forward(q, _copies(k_prefix, prefix), _copies(v_prefix, prefix), prefix, scale)
        found = [(None, out_prefix, lse)]
        for part in parts:
            part_out, part_lse = flash_forward(_of(q, part.queries), _of(k, part.keys), _of(v, part.keys), part, scale)
            found.append((part.queries, part_out, part_lse))
            if part.queries is None:
                lse = torch.logaddexp(lse, part_lse)
            else:
                joined = torch.logaddexp(_of(lse, part.queries, 1), part_lse)
                lse = lse.index_copy(1, part.queries, joined)
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        for queries, part_out, part_lse in found:
            share = (part_lse - _of(lse, queries, 1)).exp().T.unsqueeze(-1)
            _add(out, queries, part_out * share)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, k_prefix, v_prefix, out, lse)
        ctx.parts, ctx.prefix, ctx.scale = parts, prefix, scale
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, k_prefix, v_prefix, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        copies = _copies(k_prefix, ctx.prefix), _copies(v_prefix, ctx.prefix)
        d_q, *to_prefix = flash_backward(grad, q, *copies, out, lse, ctx.prefix, ctx.scale)
        to_prefix = [_from_copies(x, ctx.prefix, k_prefix.shape[0]) for x in to_prefix]
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, *to_prefix, None, None
        d_q = d_q.float()
        d_k, d_v = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        for part in ctx.parts:
            q_p, out_p, grad_p = (_of(x, part.queries) for x in (q, out, grad))
            lse_p = _of(lse, part.queries, 1).contiguous()
            found = flash_backward(grad_p, q_p, _of(k, part.keys), _of(v, part.keys), out_p, lse_p, part, ctx.scale)
            for sums, places, gradient in zip(
                (d_q, d_k, d_v), (part.queries, part.keys, part.keys), found, strict=True
            ):
                _add(sums, places, gradient)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *to_prefix, None, None


def _add(sums: Tensor, places: Tensor | None, more: Tensor) -> None:
    """sums[places] += more; no place occurs twice."""
    if places is None:
        sums += more
    else:
        sums.index_add_(0, places, more.to(sums.dtype))


def flash_proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels proved right on this device and in this precision (try_flash)."""
    return _proven.get((device, dtype), False)


def flash_serves(plan: Plan, q_THD: Tensor, v_TKD: Tensor) -> bool:
    """Whether FlashTreeAttention serves this call: proven for this device and precision, every token asking."""
    fits = plan.rows_behind_a_prefix and v_TKD.shape[-1] == q_THD.shape[-1] <= _MOST_WIDTH
    return fits and q_THD.shape[-1] % 8 == 0 and flash_proven(q_THD.device, q_THD.dtype)


def add_parts(plan: Plan) -> None:
    """Gives a plan on the host its parts, which go to the device with it in the place of its buckets."""
    if plan.parts is None and plan.rows_behind_a_prefix:
        trees, numbers = (plan.trees, plan.prefixes) if isinstance(plan, ForestPlan) else ((plan,), (0,))
        lengths = plan.lengths if isinstance(plan, ForestPlan) else (plan.prefix_keys,)
        tokens = [sum(block.length for block in tree.blocks) for tree in trees]
        plan.parts = [prefix_part(tokens, numbers, lengths), *parts_of(plan.blocks)]


def flash_attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: Plan, prefix: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """Attention of blocks behind cached prefixes; see ptp_ds.attention.tree.attend_tree."""
    if plan.parts is None:  # a plan from before the kernels proved right
        add_parts(plan)
        assert plan.parts is not None
        plan.parts = [moved(part, q_THD.device) for part in plan.parts]
    return FlashTreeAttention.apply(q_THD, k_TKD, v_TKD, *prefix, plan.parts, scale)


Reference = Callable[[Tensor, Tensor, Tensor, Plan, tuple[Tensor, Tensor], float], Tensor]


def try_flash(device: torch.device, dtype: torch.dtype, reference: Reference, tolerance: float = 2e-2) -> None:
    """Tries the kernels against `reference` on small trees, once a process; says so where they can't be used."""
    if (device, dtype) in _proven or device.type != "cuda" or dtype not in _DTYPES:
        return
    try:
        worst = largest_error(device, dtype, reference)
        reason = f"differ from the reference by {worst:.1e}" if not worst <= tolerance else ""
    except (RuntimeError, TypeError) as error:
        reason = f"fail here ({str(error).splitlines()[0]})"
    _proven[device, dtype] = not reason
    if reason:
        log.warning("ptp_ds: torch's flash kernels %s; attention takes the slower reference.", reason, extra=ANY_RANK)


def largest_error(device: torch.device, dtype: torch.dtype, reference: Reference) -> float:
    """Largest relative l2 error of output and gradients: kernels in `dtype` against `reference` in fp32 or better."""
    blocks = [Block(70, (0, 40, 60), (-1, 0, 0)), Block(1, (0,), (-1,)), Block(9, (0, 2, 5), (-1, 0, 1))]
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = [(80, 4, 64), (80, 2, 64), (80, 2, 64), (33, 2, 64), (33, 2, 64)]
    given = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator).to(device)
    ways: list[tuple[Reference, Callable[[Tensor], Tensor]]] = [(flash_attend, torch.clone), (reference, at_least_fp32)]
    errors = []
    for forest in (False, True):  # one prefix for all, or one for the last blocks and one for the first
        sides = []
        for attend, widen in ways:
            q, k, v, k_prefix, v_prefix = leaves = [widen(x).requires_grad_() for x in given]
            plan = plan_forest([(1, blocks[:2]), (0, blocks[2:])], (13, 20), device) if forest else None
            plan = plan or plan_tree(blocks, 0, 33, device)
            with torch.enable_grad():
                out = attend(q, k, v, plan, (k_prefix, v_prefix), 0.125)
                sides.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
        errors += [float((a - b).norm() / b.norm()) for a, b in zip(*sides, strict=True)]
    return max(errors)
