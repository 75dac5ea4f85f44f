"""Greedy generation: every token is the likeliest by packed scoring; the same tokens as peft's own generate."""

import pytest
import torch

from ptp_ds.adapters.generate import generate, stop_tokens
from ptp_ds.adapters.write import write_adapter
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.models.source import load_config
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import score_examples
from tests.support.deep_prompts import deep_prompt
from tests.support.packed import make_prompt
from tests.support.reference import FAMILIES, VOCABULARY, make_model

CONTEXT = [5, 17, 3, 42, 8, 77, 30]


def likeliest(backbone: Backbone, prompt: torch.Tensor, context: list[int]) -> int:
    """The next token by the scores that training and evaluation use, each token of the vocabulary an answer."""
    every = [[token] for token in range(VOCABULARY)]
    example = Example(context_ids=context, movable=[True] * len(context), candidate_ids=every, gold=0, index=0)
    return int(score_examples(backbone, prompt, [example], Ranks(0, 1, 0, torch.device("cpu")), 4096).argmax())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_tokens_are_the_likeliest_by_packed_scoring(family, kind):
    model = make_model(family)
    prompt = make_prompt() if kind == "soft" else deep_prompt(model)
    found = generate(model, prompt, kind, CONTEXT, 6)
    backbone, context = Backbone(make_model(family), prompt=kind), list(CONTEXT)
    for token in found:
        assert token == likeliest(backbone, prompt, context)
        context.append(token)
    assert len(found) == 6


def test_a_stop_token_ends_the_text():
    model, prompt = make_model("llama"), make_prompt()
    found = generate(model, prompt, "soft", CONTEXT, 6)
    place = next(place for place, token in enumerate(found) if place and token not in found[:place])
    assert generate(model, prompt, "soft", CONTEXT, 6, {found[place]}) == found[:place]
    assert generate(model, prompt, "soft", CONTEXT, 6, {found[0]}) == []


def test_stop_tokens_are_those_of_tokenizer_and_configurations(tokenizer):
    model = make_model("llama")
    assert stop_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [3, 4]
    model.config.eos_token_id = 5
    assert stop_tokens(model, tokenizer) == {tokenizer.eos_token_id, 3, 4, 5}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_peft_generates_the_same(tmp_path, tiny_model, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    prompt = deep_prompt(base) if kind == "deep" else torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", prompt, str(tiny_model), load_config(tiny_model), {}, kind)
    ours = generate(base, prompt, kind, CONTEXT, 8)
    ids = torch.tensor([CONTEXT])
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )  # fmt: skip
    assert theirs[0, len(CONTEXT) :].tolist() == ours
