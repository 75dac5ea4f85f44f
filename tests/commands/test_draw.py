"""`ptp draw`: files that the data reader finds under the names that a study writes with {draw}, and bad input."""

import csv
import json

import pytest

from ptp_ds.commands.draw import main
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split


@pytest.fixture
def given(tmp_path):
    """A CSV of 30 rows, 15 a label, and the flag that names its task."""
    file, template = tmp_path / "rows.csv", tmp_path / "tone.json"
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["line", "tone"])
        writer.writerows([f"row {n}", ("warm", "cold")[n % 2]] for n in range(30))
    spec = {"name": "Tone", "text": "{line}:", "label": "tone", "metrics": ["accuracy"]}
    template.write_text(json.dumps({**spec, "verbalizers": {"warm": " warm", "cold": " cold"}}), encoding="utf-8")
    return [str(file), "--task", str(template)]


def draw(*argv: str, capsys) -> tuple[int, str, str]:
    code = main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_table_becomes_the_splits_of_two_draws(given, tmp_path, capsys):
    out = tmp_path / "data" / "Tone"
    flags = ["--rows", "3", "--draws", "13", "21", "--test", "5", "--data_dir", str(tmp_path / "data")]
    code, said, _ = draw(*given, *flags, capsys=capsys)
    assert code == 0
    names = ["few3-13", "dev3-13", "few3-21", "dev3-21", "test5"]
    assert said.splitlines() == [f"{out / name}.jsonl: {5 if name == 'test5' else 6} rows" for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.jsonl" for name in names)
    rows = [json.loads(line) for line in (out / "few3-13.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["tone"] for row in rows) == ["cold"] * 3 + ["warm"] * 3
    assert all(row["line"].startswith("row ") for row in rows)
    task = load_task(given[2])
    assert len(load_split(task, "dev3-21", str(tmp_path / "data"), None).rows) == 6, "train finds them by their name"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "--rows is 0; expected 1 or more."),
        (["--test", "-1"], "--test is -1; expected 0 or more."),
        (["--draws", "../x"], "--draws is '../x'; expected a plain name"),
        (["--draws", "13", "13"], "--draws has 13 twice; give each once."),
        (["--rows", "8"], "has 15 rows; expected 16 or more of each label"),
        (["--task", "Tony"], "Unknown task 'Tony'"),
        (
            ["--task", "CB"],
            "rows.csv:2: the row has no field 'premise', or an empty cell; task CB needs it (the row has ",
        ),
        (["--data_dir", "{file}"], "is a file; give a folder."),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(given, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    all_flags = {"--task": [given[2]], "--rows": ["3"], "--data_dir": [str(out)]}
    all_flags[flags[0]] = [flag.format(file=given[0]) for flag in flags[1:]]
    code, _, said = draw(given[0], *(w for flag, values in all_flags.items() for w in (flag, *values)), capsys=capsys)
    assert code != 0
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["dev3-21", "few8-x", "test60"])
def test_draws_that_are_there_are_left_alone_and_none_is_added(given, tmp_path, capsys, name):
    """A draw that came later could hold rows of the test split."""
    kept = tmp_path / "Tone" / f"{name}.jsonl"
    kept.parent.mkdir()
    kept.write_text("mine", encoding="utf-8")
    (tmp_path / "Tone" / "train.jsonl").write_text("", encoding="utf-8")
    code, _, said = draw(*given, "--rows", "3", "--data_dir", str(tmp_path), capsys=capsys)
    assert code != 0
    assert f"{kept} is there already; name all draws in one call" in said
    assert sorted(path.stem for path in kept.parent.iterdir()) == sorted([name, "train"])
    assert kept.read_text(encoding="utf-8") == "mine"


def test_other_files_of_the_task_do_not_matter(given, tmp_path, capsys):
    for name in ("train", "test", "dev32"):
        (tmp_path / "Tone").mkdir(exist_ok=True)
        (tmp_path / "Tone" / f"{name}.jsonl").write_text("", encoding="utf-8")
    code, _, _ = draw(*given, "--rows", "3", "--data_dir", str(tmp_path), capsys=capsys)
    assert code == 0
