"""The official files' readers: their entries; on long and odd text what plain expressions say, in linear time."""

import random
import re
import time

import pytest

from ptp_ds.tasks import load_task
from ptp_ds.tasks.readers import _words_and_marks, noun_phrases, read, whole_number
from tests.support.task_rows import ROWS


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


def test_every_answer_and_query_is_an_entry_of_its_own():
    multirc = load_task("MultiRC").entries(ROWS["MultiRC"], "here")
    assert [(entry.key, entry.gold) for entry in multirc] == [((7, 0), 1), ((7, 0), 0), ((7, 1), 0)]
    record = load_task("ReCoRD").entries(ROWS["ReCoRD"], "here")
    assert [list(entry.golds) for entry in record] == [[2], [0, 1]]
    assert record[1].context == "Ann met Bob in Rome.\nA short visit\n"
    assert list(record[1].candidates) == [" Ann left.", " Bob left.", " Rome left."]
    assert list(record[1].names) == ["Ann", "Bob", "Rome"]
    wrong = load_task("WSC").entries(ROWS["WSC"], "here")[0]
    assert (list(wrong.golds), wrong.label) == ([], 0)  # another phrase is right, which one isn't known
    right = load_task("WSC").entries({**ROWS["WSC"], "label": True}, "here")[0]
    assert (list(right.golds), right.label) == ([0], 1)
    assert load_task("AX-g").entries(ROWS["AX-g"], "here")[0].key == (1,)


def test_noun_phrases_are_names_and_what_follows_a_determiner():
    text = "The trophy was too big for Sam Lee, so he took his old suitcase. They met a friend of the king."
    assert noun_phrases(text) == ["the trophy", "Sam Lee", "his old suitcase", "a friend", "the king"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("MultiRC", {"passage": {"text": "x"}}, "row 3: the row has no passage.questions; expected multirc's official"),
        ("MultiRC", {"passage": 5}, "row 3: the row has no passage.text"),
        ("ReCoRD", {"qas": [{"query": "no slot", "answers": [{"text": "a"}]}]}, "has a query without @placeholder"),
        ("ReCoRD", {"qas": []}, "has no list of qas"),
        ("WSC", {"target": {}}, "has no target.span1_text"),
        ("WSC", {"label": "maybe"}, "has label 'maybe'; expected true or false"),
        ("AX-g", {"idx": None}, "has no whole number in idx"),
    ],
)
def test_rows_unlike_the_official_files(name, change, message):
    with pytest.raises(ValueError, match=message):
        load_task(name).entries({**ROWS[name], **change}, "row 3")
