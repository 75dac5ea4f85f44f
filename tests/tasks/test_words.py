"""Which tokens are one word: behind spaces, of single bytes, in scripts without spaces, at a field's border."""

from types import SimpleNamespace

import pytest

from ptp_ds.perturb.a2t import attacked_words
from ptp_ds.perturb.mask import mask
from ptp_ds.tasks.data import Split, tokenise
from ptp_ds.tasks.template import parse_task
from ptp_ds.tasks.words import words_of_tokens

TASK = parse_task({"name": "T", "text": "Review: {t}\nTone:", "label": "y", "verbalizers": {"0": " no", "1": " yes"},
                   "metrics": ["accuracy"]}, "t")  # fmt: skip
SPACED = {
    "Russian": "\u042d\u0442\u043e \u0445\u043e\u0440\u043e\u0448\u0438\u0439 \u0444\u0438\u043b\u044c\u043c",
    "emoji": "nice \U0001f600 film \U0001f389 yes",
    "Korean": "\ud55c\uad6d \uc601\ud654",
    "many spaces": "a  film\n of   spaces",
    "Hindi": "\u090f\u0915 \u0905\u091a\u094d\u091b\u0940 \u092b\u093f\u0932\u094d\u092e",
}
UNSPACED = {  # words by hand, with a bar between them
    "Chinese": "\u8fd9|\u90e8|\u7535|\u5f71|\u5f88|\u597d|\u770b\u3001|\u6211|\u975e|\u5e38\u3002",
    "other letters": "\u7b2c|3|\u7ae0|AI\u3001|ok",
    "Thai": "\u0e14|3|\u0e19\u0e35\u0e49",
    "Japanese": "\u6620|\u753b|\u306f",
}


def example_of(text, tokenizer):
    return tokenise(TASK, Split([{"t": text, "y": 0}], ["row 0"], ""), tokenizer, 1000).examples[0]


def own_words(text, tokenizer):
    """The text of each word of the field, without spaces."""
    example, found = example_of(text, tokenizer), {}
    for token, word, own in zip(example.context_ids, example.words, example.movable, strict=True):
        if own:
            found.setdefault(word, []).append(token)
    return ["".join(tokenizer.decode(tokens).split()) for tokens in found.values()]


@pytest.mark.parametrize("name", SPACED)
def test_a_word_lies_between_spaces(name, tokenizer):
    """A character of several byte tokens is not several words, and spaces alone are none."""
    assert own_words(SPACED[name], tokenizer) == SPACED[name].split()


@pytest.mark.parametrize("name", UNSPACED)
def test_a_script_without_spaces_has_a_word_for_each_letter(name, tokenizer):
    """Marks and punctuation go with the letter before them."""
    words = UNSPACED[name].split("|")
    assert own_words("".join(words), tokenizer) == words


def test_a_token_of_several_letters_or_parts_of_them_is_of_one_word():
    """Two letters, one, two of which the last goes on in the next token, and one."""
    offsets = [(0, 2), (2, 3), (3, 5), (4, 5), (5, 6)]
    assert words_of_tokens("\u8fd9\u90e8\u7535\u5f71\u5f88\u597d", offsets, ["t"] * 5) == [0, 1, 2, 2, 3]


def test_a_word_begins_where_the_text_does_and_where_a_field_does():
    """Behind a start token, which holds no text; a template's space is no part of the field's first word."""
    assert words_of_tokens("film", [(0, 0), (0, 4)], [None, "t"]) == [0, 1]
    assert words_of_tokens("a: xy", [(0, 1), (1, 2), (2, 3), (3, 5)], [None, None, None, "t"]) == [0, 0, 1, 2]
    assert words_of_tokens("a: xy", [(0, 1), (1, 2), (2, 3), (3, 5)], [None, None, "t", "t"]) == [0, 0, 1, 1]


def test_a_share_of_an_unspaced_text_is_masked(tokenizer):
    """Some of its characters, each whole; the attack may count all of them."""
    text = "\u8fd9\u90e8\u7535\u5f71\u5f88\u597d\u770b\u6211\u975e\u5e38\u559c\u6b22" * 4
    example = example_of(text, tokenizer)
    assert len(attacked_words(example)) == len(text)
    (twin,) = mask([example], SimpleNamespace(mask_share=0.25, mask_id=-1), SimpleNamespace(seed=0, step=0))
    hidden = {word for word, token in zip(example.words, twin.context_ids, strict=True) if token == -1}
    assert 0 < len(hidden) < len(text) / 2
    assert all((token == -1) == (word in hidden) for word, token in zip(example.words, twin.context_ids, strict=True))
