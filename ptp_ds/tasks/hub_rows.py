"""SuperGLUE's flat rows on the hub as rows of the official files again, so that one reader reads both.

The hub has a row an answer (MultiRC) or a query (ReCoRD), and WSC's spans beside its text, not under a target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.tasks.readers import HUB_NO_LABEL

Row = dict[str, Any]
Joined = list[tuple[Row, list[int]]]  # an official row, and the numbers of the flat ones that it is made of
_TARGET = ("span2_index", "span1_index", "span1_text", "span2_text")


def official_rows(rows: list[Row], reader: str, where: str) -> tuple[list[Row], list[str]]:
    """Flat rows as official ones, in the order of their first parts, and each one's place; others as they are.

    where: the table, for messages. Raises UserError for flat rows without the numbers that say what belongs together,
    or without ReCoRD's spans.
    """
    columns, join = _FLAT.get(reader, (frozenset(), None))
    if join is None or not all(columns <= row.keys() for row in rows):
        return rows, [f"{where} row {number}" for number in range(len(rows))]
    joined = join(rows, where)
    return [row for row, _ in joined], [_place(where, numbers) for _, numbers in joined]


def _place(where: str, numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{where} row {first}" if first == last else f"{where} rows {first} to {last}"


def _wsc(rows: list[Row], where: str) -> Joined:
    joined = []
    for number, row in enumerate(rows):
        rest = {name: value for name, value in row.items() if name not in (*_TARGET, "label")}
        label = {name: bool(value) if value in (0, 1) else value for name, value in _label(row).items()}
        joined.append(({**rest, "target": {name: row[name] for name in _TARGET}, **label}, [number]))
    return joined


def _multirc(rows: list[Row], where: str) -> Joined:
    passages: dict[Any, tuple[Row, list[int]]] = {}
    questions: dict[Any, Row] = {}
    for number, row in enumerate(rows):
        of_passage, of_question, of_answer = _idx(row, ("paragraph", "question", "answer"), f"{where} row {number}")
        passage = (of_passage, str(row["paragraph"]))
        if passage not in passages:
            passages[passage] = ({"idx": of_passage, "passage": {"text": row["paragraph"], "questions": []}}, [])
        joined, numbers = passages[passage]
        question = (passage, of_question, str(row["question"]))
        if question not in questions:
            questions[question] = {"idx": of_question, "question": row["question"], "answers": []}
            joined["passage"]["questions"].append(questions[question])
        questions[question]["answers"].append({"idx": of_answer, "text": row["answer"], **_label(row)})
        numbers.append(number)
    return list(passages.values())


def _record(rows: list[Row], where: str) -> Joined:
    passages: dict[Any, tuple[Row, list[int]]] = {}
    for number, row in enumerate(rows):
        place = f"{where} row {number}"
        of_passage, of_query = _idx(row, ("passage", "query"), place)
        passage = (of_passage, str(row["passage"]))
        if passage not in passages:
            held = {"text": row["passage"], "entities": _entities(row, place)}
            passages[passage] = ({"idx": of_passage, "passage": held, "qas": []}, [])
        joined, numbers = passages[passage]
        right = row["answers"] if isinstance(row["answers"], list) else []  # none where the split has no labels
        answers = [{"text": text} for text in right]
        joined["qas"].append({"idx": of_query, "query": row["query"], **({"answers": answers} if answers else {})})
        numbers.append(number)
    return list(passages.values())


def _label(row: Row) -> Row:
    """The row's label; nothing where it has none, as in the official files."""
    return {"label": row["label"]} if row.get("label") not in (None, HUB_NO_LABEL) else {}


def _idx(row: Row, names: Sequence[str], place: str) -> list[int]:
    idx = row["idx"]
    found: list[Any] = [idx.get(name) if isinstance(idx, Mapping) else None for name in names]
    if not all(isinstance(number, int) for number in found):
        raise UserError(
            f"{place}: idx is {brief(idx)}; expected the whole numbers {', '.join(names)}, which say what belongs to "
            "one passage, so give rows that have them, or the official files with --data_dir."
        )
    return found


def _entities(row: Row, place: str) -> list[Row]:
    """Official spans, whose end is the last character, from the hub's, whose end is the one behind it.

    `entities` are texts in any order; how a program's own copy lists spans, by columns or by rows, doesn't matter.
    """
    spans = row.get("entity_spans")
    if isinstance(spans, Mapping) and isinstance(spans.get("start"), list) and isinstance(spans.get("end"), list):
        pairs = list(zip(spans["start"], spans["end"], strict=False))
    else:
        listed = spans if isinstance(spans, list) else []
        pairs = [(span.get("start"), span.get("end")) for span in listed if isinstance(span, Mapping)]
    if not pairs or not all(isinstance(number, int) for pair in pairs for number in pair):
        raise UserError(
            f"{place}: the row has no entity_spans with start and end, which older copies of the data set lack and "
            "which say where its entities stand; give the official files with --data_dir."
        )
    return [{"start": start, "end": end - 1} for start, end in pairs]


_FLAT: Mapping[str, tuple[frozenset[str], Callable[[list[Row], str], Joined]]] = {  # columns that tell them, and how
    "wsc": (frozenset(("text", *_TARGET)), _wsc),
    "multirc": (frozenset(("paragraph", "question", "answer", "idx")), _multirc),
    "record": (frozenset(("passage", "query", "answers", "idx")), _record),
}
