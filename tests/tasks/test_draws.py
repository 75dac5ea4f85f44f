"""Few-shot draws: what each split holds, that neither order nor other fields of rows count, and what is refused."""

import random

import pytest

from ptp_ds.errors import UserError
from ptp_ds.tasks import load_task
from ptp_ds.tasks.draws import draw_splits
from ptp_ds.tasks.template import parse_task

TASK = parse_task(
    {"name": "Letters", "text": "{text} is", "label": "label", "metrics": ["accuracy"],
     "verbalizers": {"a": " one", "b": " two", "c": " three"}}, "Letters",
)  # fmt: skip


def made(count: int = 60) -> list[dict]:
    """`count` rows of three labels, every second one "a"."""
    return [{"text": f"row {n}", "label": "a" if n % 2 else "bc"[n // 2 % 2], "id": f"row-{n}"} for n in range(count)]


def places(rows: list[dict]) -> tuple[list[dict], list[str]]:
    return rows, [f"rows.jsonl:{n}" for n in range(1, len(rows) + 1)]


def drawn(rows: list[dict], wanted: int, draws: list[str], test: int) -> dict[str, list[dict]]:
    return draw_splits(TASK, places(rows), wanted, draws, test).splits


def texts(rows: list[dict]) -> set[str]:
    return {row["text"] for row in rows}


def counts(rows: list[dict]) -> dict[str, int]:
    labels = [row["label"] for row in rows]
    return {label: labels.count(label) for label in set(labels)}


def test_a_draw_holds_as_many_of_each_label_twice_over_and_test_rows_are_in_none():
    splits = drawn(made(), 4, ["13", "21"], 20)
    assert list(splits) == ["few4-13", "dev4-13", "few4-21", "dev4-21", "test20"]
    for draw in ("13", "21"):
        few, dev = splits[f"few4-{draw}"], splits[f"dev4-{draw}"]
        assert counts(few) == counts(dev) == {"a": 4, "b": 4, "c": 4}
        assert not texts(few) & texts(dev)
        assert sorted(few, key=lambda row: row["label"]) != few, "labels are mixed, not one behind the other"
        assert not texts(splits["test20"]) & texts(few + dev)
        assert all(row in made() for row in few + dev), "rows are written as they stand"
    assert len(texts(splits["test20"])) == 20
    assert texts(splits["few4-13"]) != texts(splits["few4-21"])


def test_neither_the_order_of_rows_nor_their_other_fields_count():
    rows = made()
    renamed = [{**row, "id": f"other {n}", "date": n} for n, row in enumerate(random.Random(0).sample(rows, len(rows)))]
    one, other = drawn(rows, 3, ["x"], 9), drawn(renamed, 3, ["x"], 9)
    assert {name: [row["text"] for row in split] for name, split in one.items()} == {
        name: [row["text"] for row in split] for name, split in other.items()
    }


def test_test_rows_keep_the_shares_of_the_labels_and_every_row_has_its_chance():
    """Of 4,000 rows half are "a": of 1,000 drawn 500, give or take four standard deviations of 13.7."""
    held_out = drawn(made(4000), 16, ["13"], 1000)["test1000"]
    assert abs(counts(held_out)["a"] - 500) < 4 * 13.7
    numbers = [int(row["text"].split()[1]) for row in held_out]
    assert abs(sum(numbers) / 1000 - 2000) < 4 * 1155 / 1000**0.5, "the mean of uniform numbers up to 4,000"


@pytest.mark.parametrize("backwards", [False, True])
def test_of_rows_that_say_the_same_one_is_taken_and_none_where_their_labels_differ(backwards):
    again = [{"text": " row 1 ", "label": "a", "id": "z"}, {"text": "new", "label": "b"}, {"text": "new", "label": "c"}]
    rows = [*made(), *again]
    found = draw_splits(TASK, places(rows[::-1] if backwards else rows), 4, ["13"], 36)
    assert (found.repeated, found.disputed) == (1, 2)
    assert found.splits == drawn(made(), 4, ["13"], 36)
    assert len(set.union(*map(texts, found.splits.values()))) == 60


def test_labels_of_other_types_are_read_as_training_reads_them():
    spec = {"name": "Tone", "text": "{line}:", "label": "warm", "verbalizers": {"false": " no", "true": " yes"}}
    rows = [{"line": f"row {n}", "warm": bool(n % 2)} for n in range(8)]
    task = parse_task({**spec, "metrics": ["accuracy"]}, "Tone")
    splits = draw_splits(task, places(rows), 2, ["13"], 0).splits
    assert [sorted(row["warm"] for row in split) for split in splits.values()] == [[False, False, True, True]] * 2


def test_rows_whose_answers_differ_say_other_things():
    """COPA's premise comes twice, with other choices: two rows."""
    row = {"premise": "It rained.", "choice1": "It was wet.", "question": "effect", "label": 0}
    rows = [{**row, "choice2": f"It was {n}.", "label": n % 2} for n in range(4)]
    found = draw_splits(load_task("COPA"), places(rows), 1, ["13"], 0)
    assert (found.repeated, found.disputed) == (0, 0)


@pytest.mark.parametrize(
    ("rows", "wanted", "test", "message"),
    [
        ([{"text": "x"}], 1, 0, r"^rows\.jsonl:1: the row has no 'label'"),
        ([{"text": "x", "label": "d"}], 1, 0, r"^rows\.jsonl:1: label 'd' is not one of a, b, c"),
        (made(), 8, 0, r"^--rows 8: the label '[bc]' has 15 rows; expected 16 or more of each label, 8 to train on"),
        ([], 8, 0, r"^--rows 8: the label 'a' has 0 rows"),
        (made(), 4, 37, r"^--test 37: the draws leave 36 rows; give fewer rows or draws, or --test 0\.$"),
    ],
)
def test_what_cannot_be_drawn_is_said(rows, wanted, test, message):
    with pytest.raises(UserError, match=message):
        draw_splits(TASK, places(rows), wanted, ["13"], test)


@pytest.mark.parametrize("task", ["MultiRC", "WSC", "ReCoRD", "AX-g"])
def test_a_task_whose_rows_do_not_stand_alone_is_refused(task):
    with pytest.raises(UserError, match=rf"^--task {task}: its rows hold several questions or belong together"):
        draw_splits(load_task(task), places([]), 4, ["13"], 0)
