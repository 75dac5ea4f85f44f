"""Near words: which tokens are words, of which kind, and the nearest of them by cosine."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.perturb.neighbours import BARE, OTHER, WORD, Neighbours, Vocabulary, vocabulary_of
from tests.support.reference import VOCABULARY, make_model
from tests.support.words import letters

WORDS = {
    "English": "wine", "accent": "caf\xe9",
    "lower": "\u043a\u043e\u0448\u043a\u0430", "other": "\u0441\u043e\u0431\u0430\u043a\u0430",
    "title": "\u041a\u043e\u0448\u043a\u0430", "upper": "\u0414\u041e\u041c",
    "Greek": "\u03b3\u03ac\u03c4\u03b1", "Arabic": "\u0642\u0637\u0629",
    "Hindi": "\u092c\u093f\u0932\u094d\u0932\u0940",
    "Korean": "\uace0\uc591\uc774", "Chinese": "\u7535\u5f71",
    "marks": "\xab\xbb", "number": "\u0434\u04301",
}  # fmt: skip


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
    accented = WORD if mark == "\u2581" else OTHER  # in a vocabulary of bytes it is half a letter
    assert list(vocabulary.kinds) == [
        OTHER, WORD, WORD + 1, WORD + 2, OTHER, OTHER, OTHER, OTHER, accented, BARE, OTHER, BARE, OTHER
    ]  # fmt: skip
    assert vocabulary.text([1, 10, 11]) == " dogdog,"
    assert vocabulary.members == {WORD: [1, 8] if accented else [1], WORD + 1: [2], WORD + 2: [3]}


@pytest.mark.parametrize("stored", ["bytes", "pieces", "wordpiece"])
def test_words_of_all_scripts_that_write_spaces(stored):
    """Of one kind are those of one script and case; vowel signs belong to their letters, Chinese has no words here."""
    of_bytes, words = ByteLevel(add_prefix_space=False, use_regex=False), list(WORDS.values())
    tokens = {
        "bytes": [of_bytes.pre_tokenize_str(f" {word}")[0][0] for word in words], "wordpiece": words,
        "pieces": [f"\u2581{word}" for word in words],
    }[stored]  # fmt: skip
    vocabulary = vocabulary_of(fake_tokenizer(tokens))
    kinds = dict(zip(WORDS, vocabulary.kinds, strict=True))
    assert kinds["English"] == kinds["accent"] == WORD
    assert kinds["lower"] == kinds["other"]
    apart = ("English", "lower", "title", "upper", "Greek", "Arabic", "Hindi", "Korean")
    assert len({kinds[name] for name in apart}) == len(apart)
    assert [name for name, kind in kinds.items() if kind == OTHER] == ["Chinese", "marks", "number"]
    assert vocabulary.text([2, 0, 8]) == f" {WORDS['lower']} wine {WORDS['Hindi']}"
    assert vocabulary.text([4]) == f" {WORDS['lower']}", "in lower case"


def test_a_letter_with_an_accent_continues_a_beginning_as_the_plain_one_does():
    words = ["resum", "resume", "resum\u00e9", "caf", "caf\u00e9s", "cafe"]
    kinds = vocabulary_of(fake_tokenizer([f"\u2581{word}" for word in words])).kinds
    assert [word for word, kind in zip(words, kinds, strict=True) if kind == OTHER] == ["resum", "caf"]


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
