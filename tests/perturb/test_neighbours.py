"""Near words: which tokens are words, of which kind, and the nearest of them by cosine."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.perturb.neighbours import BARE, OTHER, WORD, Neighbours, Vocabulary, vocabulary_of
from tests.support.reference import VOCABULARY, make_model
from tests.support.words import letters


def fake_tokenizer(tokens, special=()):
    ids = [tokens.index(token) for token in special]

    class Fake(SimpleNamespace):
        def __len__(self):
            return len(tokens)

    return Fake(
        convert_ids_to_tokens=lambda numbers: [tokens[number] for number in numbers], all_special_ids=ids,
        get_added_vocab=dict,
    )  # fmt: skip


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_kinds_of_tokens_with_a_space_marker(mark):
    words = ["dog", "Dog", "DOG", "dOg", "the", "x", "ing2", "caf\u00e9", "."]
    tokens = ["<s>", *(mark + word for word in words), "dog", ",", None]
    vocabulary = vocabulary_of(fake_tokenizer(tokens, ["<s>"]))
    assert list(vocabulary.kinds) == [
        OTHER, WORD, WORD + 1, WORD + 2, OTHER, OTHER, OTHER, OTHER, OTHER, BARE, OTHER, BARE, OTHER
    ]  # fmt: skip
    assert vocabulary.text([1, 10, 11]) == " dogdog,"
    assert vocabulary.members == {WORD: [1], WORD + 1: [2], WORD + 2: [3]}


def test_kinds_of_wordpiece_tokens():
    vocabulary = vocabulary_of(fake_tokenizer(["[CLS]", "dog", "##dog", "##s", "."], ["[CLS]"]))
    assert list(vocabulary.kinds) == [OTHER, WORD, OTHER, OTHER, BARE]
    assert vocabulary.text([1, 3]) == " dogs"


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_a_marker_that_is_a_mere_character_of_a_wordpiece_vocabulary(mark):
    """Nor is "##" alone, a heading's, WordPiece's: a byte-level vocabulary has it."""
    tokens = ["[CLS]", "dog", "##dog", "##s"]
    with_mark = vocabulary_of(fake_tokenizer([*tokens, mark], ["[CLS]"]))
    assert list(with_mark.kinds)[:4] == list(vocabulary_of(fake_tokenizer(tokens, ["[CLS]"])).kinds)
    marked = vocabulary_of(fake_tokenizer(["##", "####", f"{mark}dog", "dog"]))
    assert list(marked.kinds) == [BARE, BARE, WORD, OTHER]


@pytest.mark.parametrize("token", ["\u0120", "\u0120\u0120", "\u010a", "\u2581\u2581"])
def test_spaces_alone_are_no_part_of_a_word(token):
    """As punctuation: the word that they stand before is still one token."""
    assert list(vocabulary_of(fake_tokenizer([token, "\u0120dog", None])).kinds) == [BARE, WORD, OTHER]


def test_mere_beginnings_of_words_are_no_words():
    words = ["discrep", "discrepancy", "discrepancies", "dog", "dogs", "quick", "quickly", "kill", "kills", "killed"]
    vocabulary = vocabulary_of(fake_tokenizer(["\u0120" + word for word in words]))
    assert [word for word, kind in zip(words, vocabulary.kinds, strict=True) if kind == OTHER] == ["discrep"]


def test_neighbours_are_the_nearest_of_their_kind():
    backbone = Backbone(make_model("llama"))
    vocabulary = Vocabulary([WORD + number % 2 for number in range(90)], [letters(number) for number in range(90)])
    near = Neighbours(vocabulary, 5, 0.1)
    weight = F.normalize(backbone.embed(torch.arange(VOCABULARY)), dim=-1)
    cosines = weight @ weight.T
    found = near.of(backbone, range(95))
    for token in range(90):
        rivals = [other for other in range(token % 2, 90, 2) if other != token and cosines[token, other] >= 0.1]
        assert found[token] == sorted(rivals, key=lambda other, token=token: -cosines[token, other])[:5]
    assert found[93] == []
    assert {len(tokens) for tokens in found.values()} > {5}
    for token in (3, 50):
        assert Neighbours(vocabulary, 5, 0.1).of(backbone, [token]) == {token: found[token]}
