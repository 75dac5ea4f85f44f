"""Prompt initialisers: on the embedding manifold, seeded, and what they say when they can't."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.prompts import initial_ids
from ptp_ds.prompts.initialise import label_ids, repeat_to_length, text_ids, vocab_ids


@pytest.fixture(scope="module")
def backbone(tiny_model):
    return Backbone(AutoModelForCausalLM.from_pretrained(tiny_model))


def start(kind, length, backbone, tokenizer, seed=0, text=None):
    answers = [text_ids(tokenizer, [answer]) for answer in (" true", " false")]
    ids = initial_ids(kind, length, tokenizer, backbone.vocabulary, seed=seed, text=text, answers=answers)
    return backbone.embed_ids(ids)


@pytest.mark.parametrize("kind", ["vocab", "text", "labels"])
def test_every_row_is_a_vocabulary_row(kind, backbone, tokenizer):
    prompt = start(kind, 9, backbone, tokenizer, text="Is it true or not?")
    table = backbone.model.get_input_embeddings().weight
    assert prompt.shape == (9, backbone.width)
    assert prompt.dtype == torch.float32
    assert all(bool((table == row).all(-1).any()) for row in prompt)


def test_text_and_labels_start_with_their_words(backbone, tokenizer):
    table = backbone.model.get_input_embeddings().weight
    words = text_ids(tokenizer, [" true", " false"])
    assert torch.equal(start("labels", len(words) + 3, backbone, tokenizer)[: len(words)], table[words])
    ids = text_ids(tokenizer, ["a b"])
    assert torch.equal(start("text", 2 * len(ids), backbone, tokenizer, text="a b"), table[ids + ids])


def test_vocab_is_seeded_without_specials_or_repeats(tokenizer):
    ids = vocab_ids(50, tokenizer, 10**6, 3)
    assert ids == vocab_ids(50, tokenizer, 10**6, 3) != vocab_ids(50, tokenizer, 10**6, 4)
    assert len(set(ids)) == 50
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert max(vocab_ids(90, tokenizer, 100, 0)) < 100
    assert len(label_ids(4, tokenizer, 10**6, 0, [[1, 2, 3], [4, 5]])) == 4


def test_errors(backbone, tokenizer):
    with pytest.raises(ValueError, match="--init_text"):
        start("text", 3, backbone, tokenizer)
    with pytest.raises(ValueError, match="no tokens"):
        repeat_to_length([], 3)
    with pytest.raises(ValueError, match="use a shorter prompt"):
        vocab_ids(10**6, tokenizer, 10**7, 0)
    with pytest.raises(ValueError, match="Unknown prompt initialiser"):
        start("zeros", 3, backbone, tokenizer)
