"""A family's own forward, one row at a time and without ours: what the start-up check holds packed passes against.

It enters by input_ids, so that nothing that a family does to its tokens outside its embedding module is left out
(scales, inputs to each layer, tokens that are dropped); gradients need embeddings, and count only where both ways
agree.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ptp_ds.attention.interface import ATTENTION_NAME
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.packing.row import PackedRow


@contextmanager
def eager(backbone: Backbone) -> Iterator[None]:
    """The family's own attention inside."""
    if not backbone.packs:
        yield
        return
    backbone.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(ATTENTION_NAME)


def ids_of(row: PackedRow, prompt_ids: Tensor) -> Tensor:
    """[T] the row's tokens with those whose embeddings the prompt is, where it stands."""
    assert row.slots is not None, "rows of their own hold the prompt"
    assert row.slot_of is not None
    return row.token_ids.index_copy(0, row.slots, prompt_ids[row.slot_of])


def plain_scores(
    backbone: Backbone, row: PackedRow, trained: Tensor, *, ids_T: Tensor | None = None, inputs_TH: Tensor | None = None
) -> Tensor:
    """[B, C] scores by one forward a block, from its tokens or from its embeddings. row: blocks that share nothing."""
    model, logits, start = backbone.model, [], 0
    for number, (block, places) in enumerate(zip(row.blocks, row.scored, strict=True)):
        part = slice(start, start + block.length)
        start += block.length
        given: dict[str, Any] = {"use_cache": False} if backbone.head.kind in ("causal", "seq2seq") else {}
        if ids_T is not None:
            given["input_ids"] = ids_T[None, part]
        elif inputs_TH is not None:
            given["inputs_embeds"] = inputs_TH[None, part]
        if row.targets:
            logits += _decoded(model, given, row.targets[number])
            continue
        out = backbone.call_model(trained, **given).logits
        logits.append(out if backbone.head.kind == "classes" else out[0, torch.from_numpy(places)])
    return row.scores(torch.cat(logits))[0]


def _decoded(model: Any, given: dict[str, Any], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each answer's tokens, the encoder's input anew for each."""
    first, device = model.config.decoder_start_token_id, model.device
    inputs = [torch.tensor([[first, *answer[:-1]]], device=device) for answer in answers]
    return [model(**given, decoder_input_ids=ids).logits[0] for ids in inputs]
