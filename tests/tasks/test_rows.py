"""Rows of a user's files: tables beside JSON lines, what is missing in them, and every message."""

import io
import json

import pytest

from ptp_ds.tasks import NoLabelError, load_task
from ptp_ds.tasks.data import is_labelled, load_rows, load_split, tokenise
from ptp_ds.tasks.template import parse_task

TRICKY = 'He said "no",\nthen: a\tb.'


def quoted(cells: list[str], delimiter: str) -> str:
    return delimiter.join('"' + cell.replace('"', '""') + '"' for cell in cells)


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_a_table_is_its_rows(tmp_path, ending, delimiter):
    lines = [quoted(cells, delimiter) for cells in (["premise", "hypothesis", "label"], [TRICKY, "b", "neutral"])]
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    split = load_rows(str(file))
    assert split.rows == [{"premise": TRICKY, "hypothesis": "b", "label": "neutral"}]
    assert split.where == [f"{file}:3"]


def test_a_split_of_a_table_is_that_of_json_lines(tmp_path, tokenizer, write_rows):
    rows = [
        {"review": f"Film {number}, seen.", "label": label} for number, label in enumerate(("negative", "positive"))
    ]
    write_rows(tmp_path / "a" / "Reviews" / "val.jsonl", rows)
    lines = [quoted(list(cells), ",") for cells in (rows[0], *(row.values() for row in rows))]
    (tmp_path / "b" / "Reviews").mkdir(parents=True)
    (tmp_path / "b" / "Reviews" / "val.csv").write_text("\n".join(lines))
    task = load_task("Reviews")
    splits = [load_split(task, "val", str(tmp_path / name), None) for name in "ab"]
    assert splits[0].rows == splits[1].rows
    assert splits[0].digest == splits[1].digest
    assert len({str(tokenise(task, split, tokenizer, 300).examples) for split in splits}) == 1


@pytest.mark.parametrize(("written", "label"), [("true", "true"), ("True", "true"), ("FALSE", "false"), ("0", "0")])
def test_labels_of_a_table_are_text(tmp_path, written, label):
    words = {"true": " yes", "false": " no"} if label != "0" else {"0": " no", "1": " yes"}
    spec = {"name": "Mine", "text": "{text}", "label": "label", "verbalizers": words, "metrics": ["accuracy"]}
    (tmp_path / "rows.csv").write_text(f"text,label\nIt rains.,{written}\n")
    (row,) = load_rows(str(tmp_path / "rows.csv")).rows
    assert parse_task(spec, "here").render(row, "row 0").gold == list(words).index(label)


def test_an_empty_cell_is_a_field_that_the_row_lacks(tmp_path):
    (tmp_path / "rows.csv").write_text("review,label\nA film.,\n,positive\n")
    split, task = load_rows(str(tmp_path / "rows.csv")), load_task("Reviews")
    assert split.rows == [{"review": "A film."}, {"label": "positive"}]
    with pytest.raises(NoLabelError, match="the row has no 'label', the label of task Reviews, or an empty cell;"):
        task.entries(split.rows[0], "row 0")
    with pytest.raises(
        ValueError,
        match=r"rows\.csv:3: the row has no field 'review', or an empty cell; task Reviews needs it \(the row has",
    ):
        is_labelled(task, split)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n1\n", r"a\.csv:3: 1 cells; expected 2, one a field of the header \("),
        ("a.csv", "x,y\n1,2,3\n", r"a\.csv:2: 3 cells; expected 2"),
        ("a.csv", "x,x\n1,2\n", r"a\.csv:1: the header has the field 'x' twice; expected the fields' names, each once"),
        ("a.tsv", "x\t\n1\t2\n", r"a\.tsv:1: the header has a field without a name; expected"),
        ("a.csv", 'x\n"a"b\n', r"a\.csv:2: not a valid table \(',' expected after '\"'\)\.$"),
        ("a.csv", 'x\n"a\n', r"a\.csv:2: not a valid table \(unexpected end of data\)\."),
        (
            "a.csv",
            '\nText;Bewertung\n"Gut, schnell";5\n',
            r"a\.csv: its cells are separated by semicolons, expected commas; save it with commas, or as \.tsv with",
        ),
        (
            "a.csv",
            '"Text";"Bewertung"\n"Gut";"5"\n',
            r"a\.csv: its cells are separated by semicolons, expected commas;",
        ),
        (
            "a.CSV",
            "Text\tBewertung\nGut\t5\n",
            r"a\.CSV: its cells are separated by tabs, expected commas; save it with",
        ),
        ("a.tsv", "x,y\n1,2\n", r"separated by commas, expected tabs; save it with tabs, or name it \.csv\.$"),
        ("a.tsv", "x;y\n1;2\n", r"separated by semicolons, expected tabs; save it with tabs\.$"),
        (
            "a.tsv",
            'x\ty\nno\t1\n2\t"Well\n\n3\tyes\n4\tsaid"\n5\tno\n',
            r"a\.tsv:3: a double quote at a cell's beginning joins the rows up to line 6 into one; expected a row a "
            r"line, so put a text .* between double quotes and double its own, or save the rows as JSON lines\.$",
        ),
        ("a.tsv", 'x\ty\n"Well\t1\nsaid"\t2\n', r"a\.tsv:2: a double quote at .* up to line 3 into one"),
        ("a.csv", "x,y\n", r"a\.csv has no rows; give a file with at least one\."),
        ("a.jsonl", "x,y\n1,2\n", r"a\.jsonl:1: not valid JSON \([^)]*\)\.$"),
        (
            "a.txt",
            "x,y\n1,2\n",
            r"a\.txt:1: not valid JSON \(.*\); rows are read from JSON lines \(\.jsonl\), or CSV or",
        ),
        ("a.parquet", "PAR1", r"a\.parquet:1: not valid JSON \(.*\); rows are read from JSON lines"),
    ],
)
def test_files_that_are_no_rows(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_a_quoted_cell_of_tabs_holds_its_line_ends(tmp_path):
    """Also a quote within a text, where none is at a cell's beginning."""
    (tmp_path / "a.tsv").write_text('x\ty\n"Well,\r\nhe said"\t1\n2\t"a\nb"\nso "he" said\t"3"\n')
    assert [list(row.values()) for row in load_rows(str(tmp_path / "a.tsv")).rows] == [
        ["Well,\r\nhe said", "1"], ["2", "a\nb"], ['so "he" said', "3"],
    ]  # fmt: skip
    (tmp_path / "b.tsv").write_text('x\n"Well,\nhe said"\n')
    assert load_rows(str(tmp_path / "b.tsv")).rows == [{"x": "Well,\nhe said"}]


def test_other_delimiters_within_a_table_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("one;two,y\n1,2\n")
    assert load_rows(str(tmp_path / "a.csv")).rows == [{"one;two": "1", "y": "2"}]
    (tmp_path / "b.csv").write_text("x\n1;2\n")
    assert load_rows(str(tmp_path / "b.csv")).rows == [{"x": "1;2"}]


def test_a_table_of_another_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes("Text,Note\nSch\u00f6n.,gut\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"a\.csv: not UTF-8 text \(.* at byte 13\); save it as UTF-8\.$"):
        load_rows(str(tmp_path / "a.csv"))


def test_official_rows_are_no_table(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nAnn thanked Mary.,true\n")
    split = load_rows(str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"rows\.csv:2: the row has no target\.span1_text; expected wsc's official"):
        load_task("WSC").entries(split.rows[0], split.where[0])


class Lines(io.TextIOWrapper):
    """Standard input that holds some bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="ascii")


def test_standard_input(monkeypatch):
    row = {"review": "Sch\u00f6n."}
    monkeypatch.setattr("sys.stdin", Lines(f"{json.dumps(row, ensure_ascii=False)}\n\n".encode()))
    split = load_rows("-")
    assert (split.rows, split.where) == ([row], ["standard input:1"])
    for content, message in (
        (b"", "--input - has no rows; give a file with at least one"),
        (b"{\n", r"standard input:1: not valid JSON \("),
        (b"\xff\n", r"standard input: not UTF-8 text \(.*\); give it as UTF-8\.$"),
    ):
        monkeypatch.setattr("sys.stdin", Lines(content))
        with pytest.raises(ValueError, match=message):
            load_rows("-")
