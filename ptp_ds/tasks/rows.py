"""Rows of a user's files: JSON lines, or CSV and TSV whose header names the fields; lines of standard input."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief, memory_bytes, parse_json, read_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".jsonl", *_DELIMITERS)  # of a split's file, in the order in which they are looked for
_SHOWN = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
FORMATS = "JSON lines (.jsonl), or CSV or TSV with a header (.csv, .tsv)"
STANDARD_INPUT = "-"

Rows = tuple[list[dict[str, Any]], list[str]]  # the rows, and each one's place for messages (file:line)


def rows_of_file(file: Path) -> Rows:
    """A file's rows, by the ending of its name; every one but .csv and .tsv is read as JSON lines.

    Cells of a table are text, an empty one is a field that its row lacks. Raises ValueError with the line at fault.
    """
    delimiter = _DELIMITERS.get(file.suffix.lower())
    if delimiter is not None:
        return _rows_of_table(read_text(file, str(file), most=None), str(file), delimiter)
    try:
        return _rows_of_lines(read_text(file, str(file), most=None), str(file))
    except ValueError as error:
        if file.suffix.lower() == ".jsonl":
            raise
        raise UserError(f"{str(error).removesuffix('.')}; rows are read from {FORMATS}.") from None


def rows_of_standard_input() -> Rows:
    """JSON lines up to the end of standard input. Raises ValueError as rows_of_file does."""
    held, most = sys.stdin.buffer, memory_bytes()
    read = held.read(most + 1)
    if len(read) > most:
        raise UserError(f"standard input: more than {most} bytes, this machine's memory; give a file in parts.")
    try:
        return _rows_of_lines(read.decode("utf-8-sig"), "standard input")
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input: not UTF-8 text ({error.reason} at byte {error.start}); give it as UTF-8."
        ) from None


def _rows_of_lines(text: str, name: str) -> Rows:
    rows, where = [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        row = parse_json(line, f"{name}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{name}:{number}: expected a JSON object, found {type(row).__name__}.")
        rows.append(row)
        where.append(f"{name}:{number}")
    return rows, where


def _rows_of_table(text: str, name: str, delimiter: str) -> Rows:
    """Lines of cells, quoted as Python's csv module reads them; a row's place is the line that it ends on."""
    _require_delimiter(text, name, delimiter)
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows: list[dict[str, Any]] = []
    where: list[str] = []
    header: list[str] = []
    begin = end = 0
    try:
        for cells in reader:
            begin, end = end, reader.line_num
            place = f"{name}:{end}"
            if not cells:
                continue
            if not header:
                header = _checked_header(cells, place)
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{place}: {len(cells)} cells; expected {len(header)}, one a field of the header (a cell that "
                    "holds the delimiter, a quote or a line's end stands in double quotes)."
                )
            if delimiter == "\t":
                _require_one_row(lines[begin:end], len(header), name, begin + 1)
            rows.append({field: cell for field, cell in zip(header, cells, strict=True) if cell.strip()})
            where.append(place)
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not a valid table ({error}).") from None
    return rows, where


def _require_one_row(lines: list[str], cells: int, name: str, first: int) -> None:
    """UserError where each of the lines that quotes join to one row of tabs, from line `first` on, has a row's cells:
    a text that begins with a double quote, unquoted, takes the rows behind it into its cell up to the next quote.
    """
    if cells > 1 and len(lines) > 1 and all(line.count("\t") == cells - 1 for line in lines if line.strip()):
        raise UserError(
            f"{name}:{first}: a double quote at a cell's beginning joins the rows up to line {first + len(lines) - 1} "
            "into one; expected a row a line, so put a text that holds double quotes between double quotes and double "
            "its own, or save the rows as JSON lines."
        )


def _require_delimiter(text: str, name: str, delimiter: str) -> None:
    """UserError where the header is one cell that holds another delimiter: such a name is no field's."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    other = next((one for one in ";\t,|" if one in header), delimiter)
    if delimiter not in header and other != delimiter:
        remedy = ", or name it .csv" if other == "," else ", or as .tsv with tabs" if delimiter == "," else ""
        raise UserError(
            f"{name}: its cells are separated by {_SHOWN[other]}, expected {_SHOWN[delimiter]}; save it with "
            f"{_SHOWN[delimiter]}{remedy}."
        )


def _checked_header(cells: list[str], place: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for number, field in enumerate(header):
        if not field or field in header[:number]:
            what = f"the field {brief(field)} twice" if field else "a field without a name"
            raise UserError(f"{place}: the header has {what}; expected the fields' names, each once.")
    return header
