"""Official files whose rows hold several questions or name their own answers, flattened: one entry a scored context."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief

_DIGITS = 18
_PLACEHOLDER = "@placeholder"
HUB_NO_LABEL = -1  # the hub's class number where a split is published without labels


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One context to score. fields: what the template fills in.

    options: answers that belong to this row alone, each with its own text behind the context; empty where the
    template's verbalizers are the answers. names: what each option stands for, as the official answer spells it.
    golds: options that are right, none where the right one isn't among them: such an entry is only evaluated.
    key: entries of a split with the same key are judged together (MultiRC's questions, AX-g's pairs). label: the row's
    official label number where it differs from the right option's number (WSC).
    """

    fields: Mapping[str, Any]
    options: Sequence[str] = ()
    names: Sequence[str] = ()
    golds: Sequence[int] = ()
    key: tuple[int, ...] | None = None
    label: int | None = None


class NoLabelError(UserError):
    """A row that doesn't say what is right, as those of official test files: it can be predicted, not judged."""


class _RowError(Exception):
    """A row that isn't as the official files are."""


class _UnlabelledError(_RowError):
    """The part of a row that says what is right is missing."""


def _at(row: Any, *path: str) -> Any:
    for name in path:
        if not isinstance(row, Mapping) or name not in row:
            raise _RowError(f"has no {'.'.join(path)}")
        row = row[name]
    return row


def _listed(row: Any, *path: str) -> list[Any]:
    found = _at(row, *path)
    if not isinstance(found, list) or not found:
        raise _RowError(f"has no list of {'.'.join(path)}")
    return found


def _text(row: Any, *path: str) -> str:
    found = _at(row, *path)
    if not isinstance(found, str) or not found.strip():
        raise _RowError(f"has no text in {'.'.join(path)}")
    return found.strip()


def whole_number(value: Any) -> Any:
    """A whole number that is spelled as text, as official files do; anything else as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) <= _DIGITS else value


def _number(row: Any, *path: str) -> int:
    found = _at(row, *path)
    found = whole_number(found)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise _RowError(f"has no whole number in {'.'.join(path)}")
    return found


def _right(find: Callable[[Any, str], Any], row: Any, name: str) -> Any:
    """What a row says is right, found by `find`, whose error becomes _UnlabelledError."""
    try:
        return find(row, name)
    except _RowError as error:
        raise _UnlabelledError(*error.args) from None


def flat(row: Mapping[str, Any], labelled: bool) -> list[Entry]:
    """A row that is one context already."""
    return [Entry(fields=row)]


def pairs(row: Mapping[str, Any], labelled: bool) -> list[Entry]:
    """Rows 2n and 2n + 1 are a pair (AX-g: one sentence with two pronouns)."""
    return [Entry(fields=row, key=(_number(row, "idx") // 2,) if labelled else None)]


def multirc(row: Mapping[str, Any], labelled: bool) -> list[Entry]:
    """Every answer to every question of a passage: fields passage, question, answer, label."""
    entries, passage = [], _text(row, "passage", "text")
    for question in _listed(row, "passage", "questions"):
        key = (_number(row, "idx"), _number(question, "idx")) if labelled else None
        for answer in _listed(question, "answers"):
            fields = {"passage": passage, "question": _text(question, "question"), "answer": _text(answer, "text")}
            if labelled:
                fields["label"] = _right(_at, answer, "label")
            entries.append(Entry(fields=fields, key=key))
    return entries


def record(row: Mapping[str, Any], labelled: bool) -> list[Entry]:
    """Every query of a passage: the passage's entities, each put in the placeholder's place, are the options.

    fields passage, before (the query up to the placeholder). An option is the entity and the rest of the query.
    """
    text, entries = _at(row, "passage", "text"), []
    if not isinstance(text, str):
        raise _RowError("has no text in passage.text")
    spans = [(_number(entity, "start"), _number(entity, "end")) for entity in _listed(row, "passage", "entities")]
    spans.sort(key=lambda span: span[0])  # as the hub has them
    names = list(dict.fromkeys(text[start : end + 1] for start, end in spans))
    *parts, last = text.split("\n@highlight\n")
    passage = "\n".join([part.rstrip() for part in parts] + [last])
    for query in _listed(row, "qas"):
        before, found, after = _text(query, "query").partition(_PLACEHOLDER)
        if not found:
            raise _RowError(f"has a query without {_PLACEHOLDER}")
        answers = _right(_listed, query, "answers") if labelled else []
        right = {_text(answer, "text") for answer in answers}
        # Quotes and brackets that open right before the placeholder belong to the option, or no space could follow.
        opening = "" if before[-1:].isspace() else "".join(before.split()[-1:])
        before = before[: len(before) - len(opening)].rstrip()
        entries.append(Entry(
            fields={"passage": passage, "before": before}, options=[f" {opening}{name}{after}" for name in names],
            names=names, golds=[place for place, name in enumerate(names) if name in right],
        ))  # fmt: skip
    return entries


_DETERMINERS = frozenset(re.findall(r"\w+", "the a an his her their its my your our this that these those some both"))
_NEVER_INSIDE = frozenset(  # words that end a noun phrase
    re.findall(
        r"\w+",
        """
    i you he she it we they him them me us who whom which what when where why how while because although though
    if since after before but and or so than as to of in on at by for from with without into over under about
    through against between behind out up down off is are was were be been being am has have had do does did
    will would can could shall should may might must not no very too never always again then there here said
    told asked knew went got came made took gave saw felt kept left let ran won
        """,
    )
)
_LONGEST = 3  # words behind a determiner


def noun_phrases(text: str) -> list[str]:
    """Names (runs of capitals) and what follows a determiner, in order, each once: a rough stand-in for a parser."""
    found: list[str] = []
    phrase: list[str] = []
    for word in [*_words_and_marks(text), "."]:
        low = word.lower()
        if phrase and _goes_on(phrase, word):
            phrase.append(word)
            continue
        if len(phrase) > 1 or (phrase and phrase[0][0].isupper()):
            found.append(" ".join(phrase))
        starts = low in _DETERMINERS or (word[0].isupper() and low not in _NEVER_INSIDE)
        phrase = [low if low in _DETERMINERS else word] if starts else []
    return list(dict.fromkeys(found))


def _words_and_marks(text: str) -> Iterator[str]:
    """Words, which may hold dots and dashes but end in neither, and every other mark, in time linear in the text."""
    for run in re.findall(r"[\w'.-]+|[^\w\s]", text):
        word = run.rstrip(".-")
        yield from [word] if word else []
        yield from run[len(word) :]


def _goes_on(phrase: list[str], word: str) -> bool:
    low = word.lower()
    if not word[0].isalpha() or low in _NEVER_INSIDE or low in _DETERMINERS or low.endswith(("n't", "ly")):
        return False
    if phrase[0] in _DETERMINERS:
        return len(phrase) <= _LONGEST and (len(phrase) == 1 or not low.endswith("ed"))
    return word[0].isupper()


def _truth(row: Mapping[str, Any]) -> int:
    label = _right(_at, row, "label")
    if not isinstance(label, bool) and label not in (0, 1):
        missing = label is None or label == HUB_NO_LABEL
        raise (_UnlabelledError if missing else _RowError)(f"has label {brief(label)}; expected true or false")
    return int(label)


def wsc(row: Mapping[str, Any], labelled: bool) -> list[Entry]:
    """The span against other noun phrases of the text: fields text (the pronoun marked), pronoun.

    The label says whether the first option, the span, is right; where it isn't, which one is stays unknown, so the row
    is only evaluated. Trained on spans, even files whose label is always true teach something (FewGLUE).
    """
    text, span, pronoun = (
        _text(row, *path) for path in (("text",), ("target", "span1_text"), ("target", "span2_text"))
    )
    place, words = _number(row, "target", "span2_index"), text.split(" ")
    label = _truth(row) if labelled else None
    if place < len(words) and words[place].strip(".,;:!?'\"").lower().startswith(pronoun.lower()[:2]):
        words[place] = f"*{words[place]}*"
    content = _content(span)
    others = [
        phrase for phrase in noun_phrases(text)
        if _differs(_content(phrase), content) and phrase.lower() != pronoun.lower()
    ]  # fmt: skip
    options = [span, *others] if others else [span, "someone else"]
    fields = {"text": " ".join(words), "pronoun": pronoun}
    return [Entry(
        fields=fields, options=[f" {option}" for option in options], names=options, golds=[0] if label else [],
        label=label,
    )]  # fmt: skip


def _content(phrase: str) -> set[str]:
    return {word for word in phrase.lower().split() if word not in _DETERMINERS}


def _differs(phrase: set[str], span: set[str]) -> bool:
    """Neither lies within the other: 'the horse' is no rival of 'the black horse'."""
    return not (phrase <= span or span <= phrase)


READERS: dict[str, Callable[[Mapping[str, Any], bool], list[Entry]]] = {
    "flat": flat, "pairs": pairs, "multirc": multirc, "record": record, "wsc": wsc,
}  # fmt: skip


OWN_ANSWERS = frozenset({"record", "wsc"})  # readers whose entries name their options
MAY_BE_EMPTY = {"record": ("before",)}  # fields that need not hold text


def read(reader: str, row: Mapping[str, Any], where: str, labelled: bool = True) -> list[Entry]:
    """A row's entries; ValueError names `where` and what the row lacks, NoLabelError where that is its label.

    labelled: whether labels are read; without, they may be missing, and the entries hold no golds, keys or labels.
    """
    try:
        return READERS[reader](row, labelled)
    except _RowError as error:
        kind = NoLabelError if isinstance(error, _UnlabelledError) else UserError
        raise kind(f"{where}: the row {error}; expected {reader}'s official format.") from None
