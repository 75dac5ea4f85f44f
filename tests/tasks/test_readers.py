"""The official files' readers on long and odd text: the same as plain expressions say, in time linear in the text."""

import random
import re
import time

import pytest

from ptp_ds.tasks import load_task
from ptp_ds.tasks.readers import _words_and_marks, noun_phrases, read, whole_number


def odd_texts(letters: str) -> list[str]:
    draw = random.Random(letters)
    return ["".join(draw.choices(letters, k=draw.randrange(1, 24))) for _ in range(3000)]


def test_words_are_those_of_the_plain_expression():
    for text in odd_texts("aB1_'.-, \n(\u00e9"):
        assert list(_words_and_marks(text)) == re.findall(r"[\w'.-]*[\w']|[^\w\s]", text), text


def test_highlights_are_joined_as_the_plain_expression_does():
    for text in odd_texts(" \n\tab"):
        marked = text.replace("b", "\n@highlight\n") + "z"
        row = {"passage": {"text": marked, "entities": [{"start": 0, "end": 0}]},
               "qas": [{"query": "@placeholder left", "answers": [{"text": "z"}]}]}  # fmt: skip
        (entry,) = read("record", row, "here")
        assert entry.fields["passage"] == re.sub(r"\s*\n@highlight\n", "\n", marked)


def test_what_opens_before_the_placeholder_belongs_to_the_option():
    for text in odd_texts(' \n("a'):
        row = {"passage": {"text": "Ann", "entities": [{"start": 0, "end": 2}]},
               "qas": [{"query": f"x{text}@placeholder left", "answers": [{"text": "Ann"}]}]}  # fmt: skip
        (entry,) = read("record", row, "here")
        opening = re.search(r"\S*\Z", f"x{text}")
        assert opening is not None
        assert entry.options == [f" {opening[0]}Ann left"]
        assert entry.fields["before"] == f"x{text}"[: opening.start()].rstrip()


@pytest.mark.parametrize("text", ["." * 300_000, "\n" * 300_000, "a." * 150_000, "x" * 300_000 + " "])
def test_long_runs_take_no_time(text):
    start = time.perf_counter()
    noun_phrases(text)
    row = {"passage": {"text": f"Ann{text}", "entities": [{"start": 0, "end": 2}]},
           "qas": [{"query": f"y{text}@placeholder", "answers": [{"text": "Ann"}]}]}  # fmt: skip
    read("record", row, "here")
    load_task("WSC").entries({"label": True, "text": f"Ann {text} she", "target": {
        "span1_text": f"Ann {text}", "span2_text": "she", "span2_index": 2}}, "here")  # fmt: skip
    assert time.perf_counter() - start < 2, "quadratic expressions took minutes"


def test_whole_numbers_of_thousands_of_digits_stay_text():
    assert whole_number("9" * 5000) == "9" * 5000
    assert whole_number("12") == 12
    assert whole_number("a") == "a"
