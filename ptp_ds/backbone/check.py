"""The start-up check: a family whose packed pass differs from its own plain ones is refused before anything trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptp_ds.attention.interface import ATTENTION_NAME, local_sizes, use_value
from ptp_ds.backbone.activations import SavedBytes
from ptp_ds.backbone.backbone import Backbone, refusal
from ptp_ds.backbone.layerwise import LayerPass
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import Rows, SeparateRows, TreeRows
from ptp_ds.packing.row import PackedRow
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example

_PROMPT = 4  # virtual tokens of the check


@dataclass(frozen=True)
class _Found:
    """layers: those whose attention was ours. local: window sizes that their attention call doesn't name."""

    layers: set[int]
    local: set[int]
    scores: Tensor
    gradient: Tensor


def checked_backbone(backbone: Backbone) -> tuple[Backbone, str]:
    """(the backbone, "") where its packed pass is exact, else (one that pads, why); ValueError where neither is."""
    try:
        if backbone.head.kind == "seq2seq":
            raise UserError(refusal(backbone.model, "an encoder-decoder isn't packed"))
        check_backbone(backbone)
        return backbone, ""
    except ValueError as error:
        reason = str(error)
    if backbone.shards.sharded:
        raise UserError(f"{reason} Or take the generic path: it needs the whole model on each rank, "
                         "--ds_config ds_configs/zero2.json.")  # fmt: skip
    padded = PaddedBackbone(backbone)
    check_backbone(padded)
    return padded, reason


def check_backbone(backbone: Backbone) -> None:
    """One packed pass against plain ones on two small rows; raises ValueError naming a family that doesn't agree.

    Checks that every layer called the tree attention, that scores agree with the family's own eager attention,
    that the prompt gets a finite non-zero gradient, and that no layer asks for a local window that its attention
    call doesn't name. Measures what kept activations cost (Backbone.activations).
    """
    model = backbone.model
    size = model.get_input_embeddings().num_embeddings
    draw = torch.randint(0, size, (24,), generator=make_generator(0, "check")).tolist()
    examples = [
        Example(context_ids=draw[:5], movable=[True] * 5, candidate_ids=[draw[5:8], draw[8:9]], gold=0, index=0),
        Example(context_ids=draw[9:12], movable=[True] * 3, candidate_ids=[draw[12:13]], gold=0, index=1),
    ]
    plain_rows = SeparateRows(kind=backbone.head.kind, prompt_length=_PROMPT, mask_id=draw[17], tail=(draw[18],),
                              choice=backbone.head.choice)  # fmt: skip
    with backbone.shards.outside_layers():
        prompt = backbone.embed(torch.tensor(draw[13:17], device=backbone.device))
        tensors = {name: tensor.to(prompt) for name, tensor in backbone.head.start(model.config, 0).items()}
        trained = backbone.head.join(prompt, tensors).detach().requires_grad_()
        shares = backbone.head.kind == "causal" and backbone.packs
        rows = TreeRows() if shares else plain_rows
        with _serving(backbone, rows, "soft"):
            found = _packed(backbone, backbone.rows.pack(examples).to(backbone.device), trained)
    _refuse(backbone, found)
    with backbone.shards.outside_layers(), _eager(backbone):
        plain = plain_scores(backbone, plain_rows.pack(examples).to(backbone.device), trained.detach())
    present = torch.isfinite(plain)
    error = float((found.scores - plain)[present].abs().max())
    bound = 1e-3 if backbone.dtype == torch.float32 else 0.5
    if not error <= bound:
        raise UserError(refusal(model, f"packed scores differ from plain ones by {error:.1e} (allowed: {bound})"))
    backbone.narrows = _narrows(backbone, examples[1], trained.detach(), bound)


@torch.no_grad()
def _narrows(backbone: Backbone, example: Example, trained: Tensor, bound: float) -> bool:
    """Whether logits of a few tokens alone are those that the whole vocabulary's product has there."""
    if backbone.output is None or backbone.head.kind not in ("causal", "masked"):
        return False
    answers = [[token] for token in example.context_ids[:2]]
    example = replace(example, candidate_ids=[*example.candidate_ids, *answers])
    kind, mask = backbone.head.kind, example.context_ids[0]
    with (
        _serving(backbone, SeparateRows(kind=kind, prompt_length=_PROMPT, mask_id=mask), "soft"),
        backbone.shards.outside_layers(),
    ):
        row = backbone.rows.pack([example]).to(backbone.device)
        inputs = backbone.inputs(row, trained)
        whole = backbone.score(row, inputs, trained)[0]
        backbone.narrows = True
        try:
            narrow = backbone.score(row, inputs, trained, narrow=True)[0]
        except RuntimeError:  # something of the vocabulary's size behind the head
            return False
        finally:
            backbone.narrows = False
    return bool(((narrow - narrow[:, :1]) - (whole - whole[:, :1])).abs().max() <= bound)


@contextmanager
def _serving(backbone: Backbone, rows: Rows, prompt: str) -> Iterator[None]:
    """The backbone with these rows, a prompt of this kind and kept activations inside."""
    before = backbone.rows, backbone.prompt, backbone.activations.mode
    backbone.rows, backbone.prompt = rows, prompt
    backbone.activations = replace(backbone.activations, mode="keep")
    try:
        yield
    finally:
        backbone.rows, backbone.prompt, mode = before
        backbone.activations = replace(backbone.activations, mode=mode)


@contextmanager
def _eager(backbone: Backbone) -> Iterator[None]:
    """The family's own attention inside."""
    if not backbone.packs:
        yield
        return
    backbone.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(ATTENTION_NAME)


def _refuse(backbone: Backbone, found: _Found) -> None:
    model = backbone.model
    expected = model.config.get_text_config().num_hidden_layers
    if len(found.layers) != expected and backbone.packs:
        raise UserError(refusal(model, f"{len(found.layers)} of its {expected} layers used our attention function"))
    if found.local:
        raise UserError(
            refusal(model, f"it masks a local window of {min(found.local)} in a way that attention can't see")
        )
    if not bool(torch.isfinite(found.gradient).all()) or not bool(found.gradient.abs().sum() > 0):
        raise UserError(refusal(model, "the prompt gets no finite, non-zero gradient through it"))


@torch.no_grad()
def plain_scores(backbone: Backbone, row: PackedRow, trained: Tensor) -> Tensor:
    """[B, C] scores by one ordinary forward of the family's own a block: the check's reference."""
    inputs, logits, start = backbone.inputs(row, trained), [], 0
    first = getattr(backbone.model.config, "decoder_start_token_id", None)
    for number, (block, places) in enumerate(zip(row.blocks, row.scored, strict=True)):
        embeds = inputs[None, start : start + block.length]
        start += block.length
        if row.targets:
            for answer in row.targets[number]:
                ids = torch.tensor([[first, *answer[:-1]]], device=embeds.device)
                logits.append(backbone.model(inputs_embeds=embeds, decoder_input_ids=ids).logits[0])
            continue
        out = backbone.call_model(trained, inputs_embeds=embeds).logits
        logits.append(out if backbone.head.kind == "classes" else out[0, torch.from_numpy(places)])
    return row.scores(torch.cat(logits))[0]


def _packed(backbone: Backbone, row: PackedRow, trained: Tensor) -> _Found:
    if backbone.packs and not backbone.takes_attention:
        raise UserError(refusal(backbone.model, "it accepts no attention function from outside"))
    seen: set[int] = set()
    passes: list[LayerPass] = []
    saved = SavedBytes(backbone.parameters())
    try:
        with use_value(local_sizes, seen), saved.counting():
            scores = backbone.score(row, backbone.inputs(row, trained), trained, watch=passes.append)
    except RuntimeError as error:  # a family's own attention, with masks for the whole row
        raise UserError(
            refusal(backbone.model, f"its layers fail on a packed row ({str(error).splitlines()[0]})")
        ) from None
    tokens = sum(section.chunk.length for section in passes[0].sections)
    backbone.activations = replace(backbone.activations, bytes_per_token=saved.total / tokens)
    layers = {number for number, calls in passes[0].attention_calls.items() if calls}
    if not layers and backbone.packs:  # nothing below would say more than that
        return _Found(layers, set(), scores[0], trained)
    (gradient,) = torch.autograd.grad(scores[row.present[None]].sum(), trained)
    named = {size for size in passes[0].windows if size is not None}
    if not row.blocks[0].causal:  # a bidirectional window of n on each side is named n + 1
        named |= {size - 1 for size in named}
    chunk = getattr(backbone.model.config.get_text_config(), "attention_chunk_size", None)
    local = seen - named - {chunk}  # max_row_length keeps rows within one chunk
    return _Found(layers, local, scores[0].detach(), backbone.head.split(gradient)[0])
