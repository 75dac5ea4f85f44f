"""The start-up check's rows, and what passes of them find: packed, plain, and each row alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ptp_ds.attention.interface import masks_seen
from ptp_ds.backbone.activations import SavedBytes
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.layerwise import LayerPass
from ptp_ds.backbone.plain import plain_scores
from ptp_ds.models.positions import max_row_length, window_lengths
from ptp_ds.packing.layouts import Rows, SeparateRows, TreeRows
from ptp_ds.packing.row import PackedRow
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example

_PROMPT = 4  # virtual tokens of the check
_PART = 1024  # words of a vocabulary that one product takes in the check's passes
_BEYOND = 8  # tokens of the long row behind the window that it crosses
_SHORT, _LONG = 23, 64  # tokens of the long row where the run's rows aren't known, and at most where it crosses none
_SPECIAL = ("pad", "bos", "eos", "mask", "sep", "cls", "unk", "decoder_start")


@dataclass(frozen=True)
class Probe:
    """The check's rows. prompt_ids: the tokens whose embeddings the prompt is. rows: those that packed passes take;
    alone: rows that share nothing, for plain ones."""

    examples: Sequence[Example]
    prompt_ids: Tensor
    trained: Tensor
    rows: Rows
    alone: SeparateRows


@dataclass(frozen=True)
class Found:
    """scores [B, C]. to_prompt: gradient of what is trained; to_context: of each example's context embeddings."""

    scores: Tensor
    to_prompt: Tensor
    to_context: list[Tensor]


def make_probe(backbone: Backbone, longest: int) -> Probe:
    """Rows of ragged contexts and answers, one of them long where the run's are longer than a window."""
    device, kind = backbone.device, backbone.head.kind
    special = {getattr(backbone.model.config, f"{name}_token_id", None) for name in _SPECIAL}
    usable = torch.tensor([token for token in range(backbone.vocabulary) if token not in special])
    limit = max_row_length(backbone.model.config) - backbone.first_position
    windows = [window for window in window_lengths(backbone.model.config) if window < longest]
    length = min(limit, longest or _SHORT, max(_LONG, *(window + _BEYOND for window in windows)) if windows else _LONG)
    length -= _PROMPT + 3  # the prompt, answers of two tokens and an end
    draw = usable[torch.randint(0, len(usable), (length + 64,), generator=make_generator(0, "check"))].tolist()
    mask = getattr(backbone.model.config, "mask_token_id", None)
    contexts, start = [], 24
    for size in (5, 3, length):
        contexts.append(draw[start : start + size])
        start += size
    answers = [[draw[0:3], draw[3:4]], [draw[4:5]], [draw[5:6], draw[6:8]]]
    examples = [
        Example(context_ids=context, movable=[True] * len(context), candidate_ids=candidates, gold=0, index=number)
        for number, (context, candidates) in enumerate(zip(contexts, answers, strict=True))
    ]
    alone = SeparateRows(
        kind=kind, prompt_length=_PROMPT, mask_id=draw[8] if mask is None else mask, tail=(draw[9],),
        choice=backbone.head.choice,
    )  # fmt: skip
    prompt_ids = torch.tensor(draw[10 : 10 + _PROMPT], device=device)
    prompt = backbone.embed(prompt_ids)
    tensors = {name: tensor.to(prompt) for name, tensor in backbone.head.start(backbone.model.config, 0).items()}
    trained = backbone.head.join(prompt, tensors).detach()
    shares = kind == "causal" and backbone.packs
    return Probe(examples, prompt_ids, trained, TreeRows() if shares else alone, alone)


def packed_pass(
    backbone: Backbone, probe: Probe, examples: Sequence[Example], passes: list[LayerPass]
) -> tuple[Found, set[int]]:
    """One packed pass of the examples, and the local windows that its masks asked for. passes: gets the pass."""
    rows = backbone.rows
    row = rows.pack(examples).to(backbone.device)
    trained = probe.trained.clone().requires_grad_()
    backbone.try_kernels()
    saved = SavedBytes(backbone.parameters())
    with _masks_of(backbone) as seen, saved.counting(), torch.enable_grad(), InParts():
        inputs = backbone.inputs(row, trained)
        delta = torch.zeros_like(inputs, requires_grad=True)
        scores = backbone.score(row, inputs + delta, trained, watch=passes.append)[0]
    tokens = sum(section.chunk.length for section in passes[-1].sections)
    backbone.activations = replace(
        backbone.activations, bytes_per_token=saved.total / tokens, input_bytes=float(hidden_bytes(backbone))
    )
    if backbone.packs and not any(passes[-1].attention_calls.values()):  # nothing below would say more than that
        return Found(scores.detach(), trained.detach(), []), set()
    to_prompt, to_delta = torch.autograd.grad(_weighed(scores, row), (trained, delta))
    return Found(scores.detach(), to_prompt, _by_context(to_delta, rows, row, examples)), seen


def hidden_bytes(backbone: Backbone) -> int:
    """Bytes of a token between two layers."""
    return backbone.model.config.get_text_config().hidden_size * backbone.dtype.itemsize


@contextmanager
def _masks_of(backbone: Backbone) -> Iterator[set[int]]:
    """See masks_seen; a model that attends by its own function makes its own masks."""
    if not backbone.packs:
        yield set()
        return
    with masks_seen(backbone.model) as seen:
        yield seen


def scores_by_embeddings(backbone: Backbone, probe: Probe, row: PackedRow, jitter: float = 0.0) -> Tensor:
    """[B, C] scores by each row's own eager forward from embeddings. jitter: see _inputs."""
    with serving(backbone, probe.alone, "soft"):
        return plain_scores(backbone, row, probe.trained, inputs_TH=_inputs(backbone, row, probe.trained, jitter))


def _inputs(backbone: Backbone, row: PackedRow, trained: Tensor, jitter: float) -> Tensor:
    """Embeddings [T, H] of rows of their own; jitter: deviation of what each number is multiplied by."""
    inputs = backbone.inputs(row, trained)
    if not jitter:
        return inputs
    noise = torch.randn(inputs.shape, generator=make_generator(0, "jitter")).to(inputs)
    return inputs * (1 + jitter * noise)


class InParts(TorchFunctionMode):
    """Inside, a product with a vocabulary goes part by part. Its backward sums over the whole vocabulary, and MKL on a
    CPU without AVX-512 does so in fp32 one after the other for a few rows: 1.6e-4 off for SmolLM2, which no noise on
    the inputs shows, since it is the same every time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        weight = args[1] if func is F.linear and len(args) > 1 else None
        if weight is None or weight.shape[0] <= _PART:
            return func(*args, **(kwargs or {}))
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        out = torch.cat([F.linear(args[0], part) for part in weight.split(_PART)], dim=-1)
        return out if bias is None else out + bias


def plain_pass(backbone: Backbone, probe: Probe, row: PackedRow, jitter: float = 0.0) -> Found:
    """The same by each row's own eager forward from embeddings. jitter: see _inputs."""
    trained = probe.trained.clone().requires_grad_()
    with torch.enable_grad(), serving(backbone, probe.alone, "soft"), InParts():
        inputs = _inputs(backbone, row, trained, jitter)
        delta = torch.zeros_like(inputs, requires_grad=True)
        scores = plain_scores(backbone, row, trained, inputs_TH=inputs + delta)
    to_prompt, to_delta = torch.autograd.grad(_weighed(scores, row), (trained, delta))
    return Found(scores.detach(), to_prompt, _by_context(to_delta, probe.alone, row, probe.examples))


def each_alone(backbone: Backbone, probe: Probe) -> Found:
    """Packed passes of one example each: scores as in company, gradients summed."""
    with serving(backbone, probe.rows, "soft"):
        found = [packed_pass(backbone, probe, [example], [])[0] for example in probe.examples]
    width = max(one.scores.shape[1] for one in found)
    padded = [torch.nn.functional.pad(one.scores, (0, width - one.scores.shape[1]), value=-torch.inf) for one in found]
    to_prompt = torch.stack([one.to_prompt for one in found]).sum(0)
    return Found(torch.cat(padded), to_prompt, [part for one in found for part in one.to_context])


def _weighed(scores_BC: Tensor, row: PackedRow) -> Tensor:
    """A sum that treats every score differently, by its example and place, so that an error in one shows."""
    numbers = row.gold.new_tensor(row.example_ids)[:, None] * 7 + torch.arange(
        scores_BC.shape[1], device=row.gold.device
    )
    return (scores_BC * torch.cos(numbers.to(scores_BC.dtype)))[row.present].sum()


def _by_context(delta_TH: Tensor, rows: Rows, row: PackedRow, examples: Sequence[Example]) -> list[Tensor]:
    """Each example's gradient at its context's tokens [n, H], summed over blocks that repeat it."""
    if row.moves_with is not None:
        delta_TH = torch.zeros_like(delta_TH).index_add(0, row.moves_with, delta_TH)
    found, first = [], 0
    for example, length in zip(examples, row.lengths, strict=True):
        places = [first + place for place in rows.context_places(example, 0)]
        found.append(delta_TH[places])
        first += length
    return found


@contextmanager
def serving(backbone: Backbone, rows: Rows, prompt: str) -> Iterator[None]:
    """The backbone with these rows, a prompt of this kind and kept activations inside."""
    before = backbone.rows, backbone.prompt, backbone.activations.mode
    backbone.rows, backbone.prompt = rows, prompt
    backbone.activations = replace(backbone.activations, mode="keep")
    try:
        yield
    finally:
        backbone.rows, backbone.prompt, mode = before
        backbone.activations = replace(backbone.activations, mode=mode)
