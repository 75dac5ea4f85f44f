"""Rows as long as the model takes: cut beforehand, or told, never a traceback in the middle of a run."""

import pytest
import torch
from sweep_models import LONGEST, Recipe, make_config, make_model

from ptp_ds.models.heads import HeadPlan
from ptp_ds.models.positions import first_position, row_room

PROMPT = 4


def passes(model, kind, length):
    """Whether the model takes a row of so many tokens, its position ids as the packed path gives them."""
    ids = torch.full((1, length), 30)
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        model = model.get_encoder()
    elif first := first_position(model):
        given["position_ids"] = torch.arange(length)[None] + first
    try:
        model(**given)
    except (RuntimeError, IndexError):
        return False
    return True


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mpt", "causal"), ("whisper", "causal"), ("led", "seq2seq"), ("roberta", "causal"), ("roberta", "masked"),
     ("xmod", "causal"), ("bert", "causal"), ("gpt2", "causal"), ("opt", "causal")],
)  # fmt: skip
@torch.no_grad()
def test_the_longest_row_is_the_longest_that_the_model_takes(name, kind):
    config = make_config(name, kind)
    longest = PROMPT + row_room(None, PROMPT, config, HeadPlan(kind))
    assert longest <= LONGEST
    model = make_model(Recipe(config, kind), eager=False)
    assert passes(model, kind, longest)
    assert not passes(model, kind, longest + 1)
