"""Few-shot draws: what each split holds, that neither order nor numbers of rows count, and what is refused."""

import random

import pytest

from ptp_ds.errors import UserError
from ptp_ds.tasks.draws import draw_splits


def made(count: int = 60) -> list[dict]:
    """`count` rows of three labels, every second one "a"."""
    return [{"text": f"row {n}", "label": "a" if n % 2 else "bc"[n // 2 % 2], "idx": n} for n in range(count)]


def places(rows: list[dict]) -> tuple[list[dict], list[str]]:
    return rows, [f"rows.jsonl:{n}" for n in range(1, len(rows) + 1)]


def texts(rows: list[dict]) -> set[str]:
    return {row["text"] for row in rows}


def counts(rows: list[dict]) -> dict[str, int]:
    labels = [row["label"] for row in rows]
    return {label: labels.count(label) for label in set(labels)}


def test_a_draw_holds_as_many_of_each_label_twice_over_and_test_rows_are_in_none():
    splits, repeated = draw_splits(places(made()), "label", 4, ["13", "21"], 20)
    assert list(splits) == ["few4-13", "dev4-13", "few4-21", "dev4-21", "test20"]
    assert repeated == 0
    for draw in ("13", "21"):
        few, dev = splits[f"few4-{draw}"], splits[f"dev4-{draw}"]
        assert counts(few) == counts(dev) == {"a": 4, "b": 4, "c": 4}
        assert not texts(few) & texts(dev)
        assert sorted(few, key=lambda row: row["label"]) != few, "labels are mixed, not one behind the other"
        assert not texts(splits["test20"]) & texts(few + dev)
    assert len(texts(splits["test20"])) == 20
    assert texts(splits["few4-13"]) != texts(splits["few4-21"])


def test_the_same_rows_in_another_order_give_the_same_draws():
    rows = made()
    shuffled = random.Random(0).sample(rows, len(rows))
    assert draw_splits(places(rows), "label", 3, ["x"], 9) == draw_splits(places(shuffled), "label", 3, ["x"], 9)


def test_test_rows_keep_the_shares_of_the_labels_and_every_row_has_its_chance():
    """Of 4,000 rows half are "a": of 1,000 drawn 500, give or take four standard deviations of 13.7."""
    splits, _ = draw_splits(places(made(4000)), "label", 16, ["13"], 1000)
    assert abs(counts(splits["test1000"])["a"] - 500) < 4 * 13.7
    numbers = sorted(row["idx"] for row in splits["test1000"])
    assert abs(sum(numbers) / 1000 - 2000) < 4 * 1155 / 1000**0.5, "the mean of uniform numbers up to 4,000"


def test_a_row_that_says_the_same_as_an_earlier_one_is_left_out():
    again = [{"text": "row 1", "label": "a", "idx": 99}, {"text": "row 1", "label": "b"}]
    splits, repeated = draw_splits(places([*made(), *again]), "label", 4, ["13"], 36)
    assert repeated == 2
    assert splits == draw_splits(places(made()), "label", 4, ["13"], 36)[0]


def test_labels_may_be_whole_numbers_and_may_have_another_name():
    rows = [{"line": f"row {n}", "tone": n % 2} for n in range(8)]
    splits, _ = draw_splits(places(rows), "tone", 2, ["13"], 0)
    assert [sorted(row["tone"] for row in split) for split in splits.values()] == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize(
    ("rows", "label", "wanted", "test", "message"),
    [
        (made(), "tone", 4, 0, r"^rows\.jsonl:1: the label is None; .* in the field 'tone', of text, label, idx\."),
        ([{"text": "x", "label": 0.5}], "label", 1, 0, r"^rows\.jsonl:1: the label is 0\.5; expected text or a whole"),
        (made(), "label", 8, 0, r"^--rows 8: '[bc]' has 15 rows; expected 16 or more of each label, 8"),
        ([], "label", 8, 0, r"^--rows 8: the file has no rows; expected 16 or more"),
        (made(), "label", 4, 37, r"^--test 37: the draws leave 36 rows; give fewer rows or draws, or --test 0\.$"),
    ],
)
def test_what_cannot_be_drawn_is_said(rows, label, wanted, test, message):
    with pytest.raises(UserError, match=message):
        draw_splits(places(rows), label, wanted, ["13"], test)
