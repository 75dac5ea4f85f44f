"""The start-up check: a family whose packed pass differs from its own plain ones is refused before anything trains.

Rows of different lengths lie in one pass, one of them beyond a window where the run's rows go there; each is held
against the family's own forward of that row alone, by its tokens. Bounds are relative, for scores and for gradients of
the prompt and of the rows' embeddings. A model whose shards can't be differentiated plainly (ZeRO-3) has its gradients
in company held against those of each row alone.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptp_ds.backbone.backbone import Backbone, FamilyError, family_of
from ptp_ds.backbone.joint_products import join_products
from ptp_ds.backbone.layerwise import LayerPass
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.backbone.plain import eager, ids_of, plain_scores
from ptp_ds.backbone.probe import (
    Found,
    Probe,
    each_alone,
    make_probe,
    packed_pass,
    plain_pass,
    scores_by_embeddings,
    serving,
)
from ptp_ds.errors import UserError
from ptp_ds.packing.row import PackedRow
from ptp_ds.prompts.soft import embedding_width
from ptp_ds.ranks.agreement import Agreement
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import befell

# Bounds of scores and of gradients. In fp32 an exact family is off by about what its own rounding makes of a last digit
# of its inputs, which is measured (_own_rounding); what leaks between rows can be far below any fixed bound.
_FULL, _HALF = (1e-3, 1e-2), (0.25, 0.5)  # at most, for fp32 or better and below
_SURE, _MARGIN, _LAST_DIGIT = 1e-5, 20.0, 2.0**-23  # nobody asks below; times of its own rounding
_SCORE_DIGITS = 4  # last digits by which a score may be off: a model that knows little of many words has few others
# Of scores by embeddings against those by tokens, whose passes are otherwise the same.
_SAME_INPUTS, _SAME_INPUTS_HALF = 1e-5, 1e-2


def checked_backbone(
    backbone: Backbone, longest: int = 0, ranks: Ranks | None = None
) -> tuple[Backbone, FamilyError | None]:
    """(the backbone, None) where its packed pass is exact, else (one that pads, why); UserError where neither is.

    longest: tokens of the run's longest row, prompt included. ranks: those that must come to the same result, and all
    call it; None for this process alone.
    """
    try:
        if backbone.head.kind == "seq2seq":
            raise FamilyError(backbone.model, "an encoder-decoder isn't packed")
        check_backbone(backbone, longest, ranks)
        return backbone, None
    except FamilyError as error:
        refused = error
    if backbone.shards.sharded:
        raise UserError(
            f"Model family {family_of(backbone.model)!r} can't be packed, so it needs the whole model on each "
            f"rank: give --ds_config zero2 ({refused.why})."
        )
    padded = PaddedBackbone(backbone)
    check_backbone(padded, longest, ranks)
    return padded, refused


def check_backbone(backbone: Backbone, longest: int = 0, ranks: Ranks | None = None) -> None:
    """Packed passes against plain ones; raises ValueError naming a family that doesn't agree. longest, ranks: see
    above.

    Checks that every layer called the tree attention, that no layer asks for a local window that its attention call
    doesn't name, that the prompt is as wide as the token embeddings and gets a finite non-zero gradient, that scores
    and gradients agree with the family's own eager attention, and that no forward changes the model. Measures what kept
    activations cost (Backbone.activations), and whether the head can do with less (Backbone.narrows, head_input). Joins
    products before that (Backbone.joint).
    """
    gathers = backbone.shards.sharded and not backbone.shards.shared
    elsewhere = FamilyError(backbone.model, "the start-up check fails on another rank, which says why")
    agreement = Agreement(ranks, elsewhere, speaks=not gathers)
    with agreement.telling():
        _check(backbone, longest, agreement)
    backbone.shards.traffic.reset()  # a run counts its own


def _check(backbone: Backbone, longest: int, agreement: Agreement) -> None:
    """See check_backbone. Whatever a bound decides is agreed on first: ranks may round differently."""
    if backbone.packs and not backbone.takes_attention:
        raise FamilyError(backbone.model, "it accepts no attention function from outside")
    before = _state(backbone.model)
    join_products(backbone)  # so that what is checked is what runs
    with _family_fails(backbone), backbone.shards.outside_layers():
        probe = make_probe(backbone, longest)
        passes: list[LayerPass] = []
        with serving(backbone, probe.rows, "soft"):
            found, local = packed_pass(backbone, probe, probe.examples, passes)
    _refuse_pass(backbone, passes[0], local)
    if (read := embedding_width(backbone.model.config)) != backbone.width:  # what a prompt is made by
        reason = f"its token embeddings have {backbone.width} numbers, and its config.json is read as saying {read}"
        raise FamilyError(backbone.model, reason)
    if agreement.largest(not _is_alive(found.to_prompt))[0]:
        raise FamilyError(backbone.model, "the prompt gets no finite, non-zero gradient through it")
    with _family_fails(backbone), backbone.shards.outside_layers():
        alone = probe.alone.pack(probe.examples).to(backbone.device)
        by_ids, by_embeddings, plain = _references(backbone, probe, alone)
    if changed := sorted(name for name, value in _state(backbone.model).items() if before.get(name, value) != value):
        raise FamilyError(backbone.model, f"its forward changes its own {changed[0]} for good")
    [error] = agreement.largest(_apart(by_embeddings, by_ids, _guess(backbone, probe, by_ids)))
    if not error <= _same_inputs(backbone):
        reason = f"its forward does more to tokens than to embeddings (scores differ by {error:.1e})"
        raise FamilyError(backbone.model, reason)
    _compare(backbone, probe, alone, found, plain, by_ids, agreement)
    with _family_fails(backbone):
        if backbone.head.kind == "causal" and agreement.largest(not _sees_no_later_token(backbone, probe))[0]:
            raise FamilyError(backbone.model, "its tokens see later ones, so that answers have no scores")
        if backbone.packs and backbone.head_input == "row":
            [error] = agreement.largest(_scored_alone(backbone, probe, found))
            backbone.head_input = "scored" if error <= _same_inputs(backbone) else "row"
        backbone.narrows = not agreement.largest(not _narrows(backbone, probe))[0]


def _references(backbone: Backbone, probe: Probe, alone: PackedRow) -> tuple[Tensor, Tensor, Found]:
    """(plain scores by tokens, plain scores by embeddings, what gradients are held to)."""
    with eager(backbone):
        with torch.no_grad():
            by_ids = plain_scores(backbone, alone, probe.trained, ids_T=ids_of(alone, probe.prompt_ids))
        if not backbone.shards.sharded:
            plain = plain_pass(backbone, probe, alone)
            return by_ids, plain.scores, plain
        with torch.no_grad():
            by_embeddings = scores_by_embeddings(backbone, probe, alone)
    return by_ids, by_embeddings, each_alone(backbone, probe)


def _compare(
    backbone: Backbone, probe: Probe, alone: PackedRow, found: Found, plain: Found, by_ids: Tensor, agreement: Agreement
) -> None:
    """ValueError where scores or gradients lie further apart than the family's own rounding explains."""
    guess = _guess(backbone, probe, by_ids)
    errors = agreement.largest(_apart(found.scores, by_ids, guess), _gradient_errors(found, plain))
    bounds = _bounds(backbone)
    if bounds is _FULL and max(errors) > _SURE:
        own = _own_rounding(backbone, probe, alone, plain, by_ids)
        off = _apart(by_ids * (1 + _SCORE_DIGITS * _LAST_DIGIT), by_ids, guess)
        scores, gradients, digits = agreement.largest(*own, off)
        bounds = min(bounds[0], max(_SURE, _MARGIN * scores, digits)), min(bounds[1], max(_SURE, _MARGIN * gradients))
    for what, error, allowed in zip(("scores", "gradients"), errors, bounds, strict=True):
        if not error <= allowed:
            reason = f"its packed {what} differ from plain ones by {error:.1e} (allowed: {allowed:.0e})"
            raise FamilyError(backbone.model, reason if backbone.packs else reason.replace("packed", "padded"))


def _gradient_errors(found: Found, plain: Found) -> float:
    """The largest relative distance of a gradient: the prompt's, or one row's."""
    pairs = [(found.to_prompt, plain.to_prompt), *zip(found.to_context, plain.to_context, strict=True)]
    return _worst(float((a - b).float().norm() / b.float().norm().clamp_min(1e-12)) for a, b in pairs)


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN is inf, since max would pass over it."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def _own_rounding(
    backbone: Backbone, probe: Probe, alone: PackedRow, plain: Found, by_ids: Tensor
) -> tuple[float, float]:
    """How far plain scores and gradients move with the last digit of the inputs; sharded models tell no gradients."""
    guess = _guess(backbone, probe, by_ids)
    with _family_fails(backbone), backbone.shards.outside_layers(), eager(backbone):
        if backbone.shards.sharded:
            with torch.no_grad():
                return _apart(scores_by_embeddings(backbone, probe, alone, _LAST_DIGIT), by_ids, guess), _FULL[1]
        moved = plain_pass(backbone, probe, alone, _LAST_DIGIT)
    return _apart(moved.scores, by_ids, guess), _gradient_errors(moved, plain)


def _apart(scores: Tensor, wanted: Tensor, guess: Tensor) -> float:
    """How far scores are from the wanted ones, relative to what these know beyond a guess."""
    present = torch.isfinite(wanted)
    known = (wanted - guess)[present]
    return float((scores - wanted)[present].norm() / (known - known.mean()).norm().clamp_min(1e-6))


def _guess(backbone: Backbone, probe: Probe, like: Tensor) -> Tensor:
    """[B, C] scores of a model to which all tokens are equally likely: longer answers score less, whatever it knows."""
    scores = torch.zeros_like(like)
    if backbone.head.kind == "classes":
        return scores
    for row, example in zip(scores, probe.examples, strict=True):
        for number, answer in enumerate(example.candidate_ids):
            row[number] = -len(answer) * math.log(backbone.vocabulary)
    return scores


def _bounds(backbone: Backbone) -> tuple[float, float]:
    return _FULL if backbone.dtype.itemsize >= 4 else _HALF


def _same_inputs(backbone: Backbone) -> float:
    return _SAME_INPUTS if _bounds(backbone) is _FULL else _SAME_INPUTS_HALF


@torch.no_grad()
def _sees_no_later_token(backbone: Backbone, probe: Probe) -> bool:
    """Whether tokens' logits are the same with others behind them, one or many, in the family's own forward."""
    ids = torch.tensor([probe.examples[-1].context_ids], device=backbone.device)
    count = ids.shape[1]
    with backbone.shards.outside_layers(), eager(backbone):
        whole, *parts = (
            backbone.model(input_ids=ids[:, :length], use_cache=False).logits[0].float()
            for length in (count, count - 1, (count + 1) // 2)
        )
    bound = _bounds(backbone)[0] * float((whole - whole.mean()).norm()) / count**0.5
    return all(float((whole[: len(part)] - part).norm()) <= bound * len(part) ** 0.5 for part in parts)


def _scored_alone(backbone: Backbone, probe: Probe, whole: Found) -> float:
    """How far a pass whose norm and head see scored tokens alone is from `whole`; inf where the family can't do it."""
    backbone.head_input = "scored"
    try:
        with serving(backbone, probe.rows, "soft"), backbone.shards.outside_layers():
            found, _ = packed_pass(backbone, probe, probe.examples, [])
    except Exception as error:  # a family that brings what its layers give into its input's shape
        if befell(error):
            raise
        return math.inf
    finally:
        backbone.head_input = "row"
    scores = _apart(found.scores, whole.scores, _guess(backbone, probe, whole.scores))
    return _worst((scores, _gradient_errors(found, whole)))


@torch.no_grad()
def _narrows(backbone: Backbone, probe: Probe) -> bool:
    """Whether logits of a few tokens alone are those that the whole vocabulary's product has there."""
    kind = backbone.head.kind
    if backbone.output is None or kind not in ("causal", "masked"):
        return False
    example = probe.examples[1]
    answers = [[token] for token in example.context_ids[:2]]
    example = replace(example, candidate_ids=[*example.candidate_ids, *answers])
    with serving(backbone, probe.alone, "soft"), backbone.shards.outside_layers():
        row = backbone.rows.pack([example]).to(backbone.device)
        inputs = backbone.inputs(row, probe.trained)
        whole = backbone.score(row, inputs, probe.trained)[0]
        backbone.narrows = True
        try:
            narrow = backbone.score(row, inputs, probe.trained, narrow=True)[0]
        except RuntimeError as error:  # something of the vocabulary's size behind the head
            if befell(error):
                raise
            return False
        finally:
            backbone.narrows = False
    gaps, wanted = narrow - narrow[:, :1], whole - whole[:, :1]
    bound = _bounds(backbone)[0]
    return float((gaps - wanted).norm()) <= bound * max(float(wanted.norm()), 1e-6)


@contextmanager
def _family_fails(backbone: Backbone) -> Iterator[None]:
    """What a family's own code raises inside is why it is refused; full memory and a lost rank pass as they are."""
    try:
        yield
    except FamilyError:
        raise
    except Exception as error:  # masks of the whole row, arguments that it lacks, operations in place
        if befell(error):
            raise
        raise FamilyError(backbone.model, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    said = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    return f"its layers fail on the check's rows ({type(error).__name__}: {said})"


def _state(model: nn.Module) -> dict[str, Any]:
    """Plain settings of the model's modules by name: what a forward must leave as it is."""
    kinds = (bool, int, float, str)
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds) and not name.startswith("_")
    }


def _is_alive(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient).all()) and bool(gradient.abs().sum() > 0)


def _refuse_pass(backbone: Backbone, layer_pass: LayerPass, local: set[int]) -> None:
    """ValueError for layers that didn't attend by our function, and for windows that it can't see."""
    model, row = backbone.model, layer_pass
    layers = {number for number, calls in row.attention_calls.items() if calls}
    if backbone.packs and len(layers) != backbone.stack.count:
        raise FamilyError(model, f"{len(layers)} of its {backbone.stack.count} layers used our attention function")
    named = {size for size in row.windows if size is not None}
    if not all(block.causal for section in row.sections for block in section.chunk.plan.blocks):
        named |= {size - 1 for size in named}  # a bidirectional window of n on each side is named n + 1
    config = model.config.get_text_config()
    chunk, kinds = getattr(config, "attention_chunk_size", None), getattr(config, "layer_types", None) or ["unknown"]
    if set(kinds) == {"full_attention"}:  # masks with windows are made, and no layer takes one
        local = set()
    if unseen := local - named - {chunk}:  # max_row_length keeps rows within one chunk
        raise FamilyError(model, f"it masks a local window of {min(unseen)} in a way that attention can't see")
