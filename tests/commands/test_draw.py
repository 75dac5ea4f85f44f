"""`ptp draw`: files that the data reader finds under the names that a study writes with {draw}, and bad input."""

import csv
import json

import pytest

from ptp_ds.commands.draw import main


@pytest.fixture
def table(tmp_path):
    """A CSV of 30 rows, 15 a label."""
    file = tmp_path / "rows.csv"
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["line", "tone"])
        writer.writerows([f"row {n}", ("warm", "cold")[n % 2]] for n in range(30))
    return str(file)


def draw(*argv: str, capsys) -> tuple[int, str, str]:
    code = main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_table_becomes_the_splits_of_two_draws(table, tmp_path, capsys):
    out = tmp_path / "data" / "Tone"
    flags = ["--label", "tone", "--rows", "3", "--draws", "13", "21", "--test", "10", "--output_dir", str(out)]
    code, said, _ = draw(table, *flags, capsys=capsys)
    assert code == 0
    names = ["few3-13", "dev3-13", "few3-21", "dev3-21", "test10"]
    assert said.splitlines() == [f"{out / name}.jsonl: {10 if name == 'test10' else 6} rows" for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.jsonl" for name in names)
    rows = [json.loads(line) for line in (out / "few3-13.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["tone"] for row in rows) == ["cold"] * 3 + ["warm"] * 3
    assert all(row["line"].startswith("row ") for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "--rows is 0; expected 1 or more."),
        (["--test", "-1"], "--test is -1; expected 0 or more."),
        (["--draws", "../x"], "--draws is '../x'; expected a plain name"),
        (["--draws", "13", "13"], "--draws has 13 twice; give each once."),
        (["--rows", "8"], "' has 15 rows; expected 16 or more of each label"),
        (["--label", "mood"], "the label is None; expected text or a whole number in the field 'mood', of line, tone."),
        (["--output_dir", "{table}"], "is a file; give a folder."),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(table, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    given = {"--label": ["tone"], "--rows": ["3"], "--output_dir": [str(out)]}
    given[flags[0]] = [flag.format(table=table) for flag in flags[1:]]
    code, _, said = draw(table, *(word for flag, values in given.items() for word in (flag, *values)), capsys=capsys)
    assert code != 0
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_files_that_are_there_are_left_alone(table, tmp_path, capsys):
    flags = [table, "--label", "tone", "--rows", "3", "--output_dir", str(tmp_path)]
    kept = tmp_path / "dev3-21.jsonl"
    kept.write_text("mine", encoding="utf-8")
    code, _, said = draw(*flags, capsys=capsys)
    assert code != 0
    assert f"{kept} is there already; give another --output_dir." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev3-21.jsonl", "rows.csv"]
    assert kept.read_text(encoding="utf-8") == "mine"
