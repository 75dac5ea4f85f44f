"""Task templates: JSON files that say how a row reads, which answers there are and which metrics count.

Keys of a template file:
  name        folder of the data, `<data_dir>/<name>/<split>.jsonl`, .csv or .tsv
  text        the context, with {field} or {field|filter} for the row's fields; filters: strip_stop, lower_first;
              <prompt> where the soft prompt stands, in front of everything where it is left out
  truncate    the field that is shortened (from its middle) when a row exceeds the backbone's context
  values      optional, {field: {raw value: text}}: replaces raw values by words (COPA: cause -> because)
  fixed       optional, fields that a perturbation must leave alone; fields under `values` always are
  attack      optional, fields whose words --perturbation a2t may swap; default: `truncate` where it is given (the
              premise or passage, never its hypothesis or question), else all that may be perturbed
  instruction optional, a sentence that says what is asked: where --prompt_init text begins without --init_text
  label       the row's field with the gold answer
  verbalizers {label: answer text}, the same answers for all rows; or
  candidates  {label: answer text with {field}s}, answers that differ from row to row
  reader      optional, from ptp_ds.tasks.readers: for official files whose rows hold several questions (multirc),
              belong together in pairs (pairs), or name their own answers (record, wsc: then neither label nor
              verbalizers nor candidates)
  metrics     names from ptp_ds.tasks.metrics
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, listed, plain_name, read_json
from ptp_ds.tasks.metrics import METRICS, NEEDS_READER
from ptp_ds.tasks.readers import HUB_NO_LABEL, MAY_BE_EMPTY, OWN_ANSWERS, READERS, NoLabelError, read

_TEMPLATES = Path(__file__).parent / "templates"
SLOT = re.compile(r"\{(\w+)(?:\|(\w+))?\}")
_FILTERS: dict[str, Callable[[str], str]] = {
    "strip_stop": lambda text: text.rstrip().rstrip("."),
    "lower_first": lambda text: text[:1].lower() + text[1:],
}
PROMPT_MARK = "<prompt>"
_BOOLEANS = (("true", "True", "TRUE"), ("false", "False", "FALSE"))  # as JSON, Python and spreadsheets spell them
_UNLABELLED = {str(None), str(HUB_NO_LABEL)}
_REQUIRED = {"name", "text", "metrics"}
_KEYS = _REQUIRED | {
    "label",
    "truncate",
    "values",
    "fixed",
    "attack",
    "verbalizers",
    "candidates",
    "reader",
    "instruction",
}


@dataclass(frozen=True)
class Rendered:
    """A row as text. pieces: (text, field or None for template words) whose concatenation is the context.

    gold: the right candidate, the first of them where golds holds several; golds is empty where none is known to be
    right, such a row is only evaluated. names, key, label: see ptp_ds.tasks.readers.Entry. prompt_at: the context's
    character before which the soft prompt stands.
    """

    pieces: Sequence[tuple[str, str | None]]
    candidates: Sequence[str]
    gold: int
    golds: Sequence[int] = ()
    names: Sequence[str] = ()
    key: Any = None
    label: int | None = None
    prompt_at: int = 0

    @property
    def context(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One template file, parsed; see the module's text for the fields."""

    name: str
    text: str
    metrics: tuple[str, ...]
    label: str | None = None
    answers: Mapping[str, str] = field(default_factory=dict)
    reader: str = "flat"
    truncate: str | None = None
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    attack: frozenset[str] = frozenset()
    instruction: str | None = field(default=None, compare=False)  # no part of how rows read

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.answers)

    @property
    def positive(self) -> int:
        """The number of the label whose F1 is f1a: the label 1, the second where none is called so."""
        return self.labels.index("1") if "1" in self.answers else 1

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that the context and the answers are made of, in order."""
        texts = (self.text, *self.answers.values())
        return tuple(dict.fromkeys(slot[1] for text in texts for slot in SLOT.finditer(text)))

    @property
    def of_fields(self) -> bool:
        """Whether rows are fields of text and nothing else."""
        return self.reader in ("flat", "pairs")

    @property
    def answer_fields(self) -> frozenset[str]:
        """Fields that stand in answers."""
        return frozenset(slot[1] for text in self.answers.values() for slot in SLOT.finditer(text))

    @property
    def fixed_fields(self) -> frozenset[str]:
        """Fields whose tokens count as template words: never perturbed."""
        return self.fixed | frozenset(self.values)

    @property
    def choice(self) -> bool:
        """Whether answers differ from row to row: a choice among texts, not among classes."""
        return not self.answers or any(SLOT.search(answer) for answer in self.answers.values())

    def attacks(self, name: str | None) -> bool:
        """Whether an attack on the text may change field `name`, as far as it is movable at all."""
        fields = self.attack or ({self.truncate} if self.truncate is not None else None)
        return fields is None or name in fields

    def spec(self) -> dict[str, Any]:
        """The template as plain data, for config.json and for telling two templates apart: how its rows read, without
        the instruction, which is where a prompt may begin (RunConfig.init_text has it then)."""
        return {
            "name": self.name, "text": self.text, "label": self.label, "metrics": list(self.metrics),
            "answers": dict(self.answers), "truncate": self.truncate,
            "values": {key: dict(value) for key, value in self.values.items()}, "fixed": sorted(self.fixed),
            **({} if self.reader == "flat" else {"reader": self.reader}),
            **({"attack": sorted(self.attack)} if self.attack else {}),
        }  # fmt: skip

    def is_same(self, other: "Task") -> bool:
        """Whether both are one template, with their answers in one order: a classifier's outputs follow it."""
        return same_spec(self.spec(), other.spec())

    def entries(self, row: Mapping[str, Any], where: str, labelled: bool = True) -> list[Rendered]:
        """Every context of a row of the task's file; ValueError names `where` and what is at fault.

        labelled: whether labels are read (NoLabelError where one is missing); without, the golds are empty.
        """
        rendered = []
        for entry in read(self.reader, row, where, labelled):
            if entry.options:
                gold = entry.golds[0] if entry.golds else 0
                pieces, at = self._context(entry.fields, where)
                for option in entry.options:
                    require_utf8(option, f"{where}: the answer {brief(option)}")
                found = Rendered(pieces, entry.options, gold, entry.golds, entry.names, entry.key, entry.label, at)
            else:
                found = replace(self.render(entry.fields, where, labelled), key=entry.key)
            rendered.append(found)
        return rendered

    def render(self, row: Mapping[str, Any], where: str, labelled: bool = True) -> Rendered:
        """Fields as context pieces, candidates and gold; ValueError names `where` and the field at fault."""
        pieces, at = self._context(row, where)
        candidates = ["".join(text for text, _ in self._fill(answer, row, where)) for answer in self.answers.values()]
        if not labelled:
            return Rendered(pieces, candidates, 0, prompt_at=at)
        if self.label is None or self.label not in row:
            raise NoLabelError(
                f"{where}: the row has no {brief(self.label)}, the label of task {self.name}, or an empty cell; it has "
                f"{listed(row) or 'nothing'}. Correct row or template, or give a split whose rows all have labels."
            )
        label = next((one for one in _spellings(row[self.label]) if one in self.answers), None)
        if label is None:
            label = canonical_label(row[self.label])
            kind = NoLabelError if label in _UNLABELLED else UserError
            known = listed(self.answers)
            raise kind(f"{where}: label {brief(label)} is not one of {known} (task {self.name}).")
        gold = self.labels.index(label)
        return Rendered(pieces, candidates, gold, (gold,), prompt_at=at)

    @property
    def places_prompt(self) -> bool:
        """Whether the text says where the soft prompt stands; in front of everything otherwise."""
        return PROMPT_MARK in self.text

    def _context(self, row: Mapping[str, Any], where: str) -> tuple[list[tuple[str, str | None]], int]:
        """(the context's pieces, the character before which the prompt stands)."""
        before, _, after = self.text.rpartition(PROMPT_MARK)
        pieces = self._fill(before, row, where)
        return pieces + self._fill(after, row, where), sum(len(text) for text, _ in pieces)

    def _fill(self, template: str, row: Mapping[str, Any], where: str) -> list[tuple[str, str | None]]:
        pieces: list[tuple[str, str | None]] = []
        end = 0
        for slot in SLOT.finditer(template):
            if slot.start() > end:
                pieces.append((template[end : slot.start()], None))
            pieces.append((self._field(row, slot[1], slot[2], where), slot[1]))
            end = slot.end()
        if end < len(template):
            pieces.append((template[end:], None))
        return pieces

    def _field(self, row: Mapping[str, Any], name: str, filter_name: str | None, where: str) -> str:
        if name not in row:
            raise UserError(
                f"{where}: the row has no field {brief(name)}, or an empty cell; task {self.name} needs it (the row "
                f"has {listed(row) or 'nothing'})."
            )
        value = row[name]
        if not isinstance(value, str) or not (value.strip() or name in MAY_BE_EMPTY.get(self.reader, ())):
            raise UserError(f"{where}: field {brief(name)} must be non-empty text, not {brief(value)}.")
        require_utf8(value, f"{where}: field {brief(name)}")
        value = value.strip()
        if name in self.values:
            if value not in self.values[name]:
                raise UserError(
                    f"{where}: field {brief(name)} is {brief(value)}; expected {listed(self.values[name])}."
                )
            value = self.values[name][value]
        return _FILTERS[filter_name](value) if filter_name else value


def same_spec(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Task.is_same of templates as plain data (see Task.spec), such as records hold."""
    return one == other and list(one["answers"]) == list(other["answers"])


def require_utf8(text: str, what: str) -> None:
    """UserError where a text holds half a surrogate, which stands for a character cut in two or a byte that is not
    UTF-8's, and which tokenizers don't take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds {text[error.start]!r} at character {error.start}, half a character or a byte of another "
            "encoding; give whole characters, as UTF-8."
        ) from None


def canonical_label(value: Any) -> str:
    """A label as JSON spells it: true / false for booleans, digits for whole numbers (1.0, too), else the text."""
    if isinstance(value, float) and value.is_integer():  # pandas makes a column with gaps one of floats
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _spellings(value: Any) -> tuple[str, ...]:
    """What a template may call a row's label, first what comes before the others."""
    label = canonical_label(value)
    booleans = next((spelled for spelled in _BOOLEANS if label in spelled), ())
    return (str(value), label, *booleans) if isinstance(value, float) else (label, *booleans)


def builtin_templates() -> list[str]:
    """Names of the templates that ship with the package: <task>, and <task>.<variant> for other words."""
    return sorted(path.stem for path in _TEMPLATES.glob("*.json"))


def builtin_tasks() -> list[str]:
    """Names of the tasks whose templates ship with the package."""
    return [name for name in builtin_templates() if "." not in name]


def load_task(name: str) -> Task:
    """A built-in task by name, or a template by the path of its .json file. Raises ValueError with what is wrong."""
    if name in builtin_templates():
        return parse_task(read_json(_TEMPLATES / f"{name}.json", f"task {name}"), f"task {name}")
    path = Path(name)
    if path.suffix == ".json":
        if not is_file(path):
            raise UserError(f"--task {name}: there is no such template file.")
        return parse_task(read_json(path, str(path)), str(path))
    likeness = {task: difflib.SequenceMatcher(None, name.lower(), task.lower()).ratio() for task in builtin_tasks()}
    near = max(likeness, key=lambda task: (likeness[task], -len(task)))
    hint = f" (did you mean {near}?)" if likeness[near] >= 0.5 else ""
    if is_file(f"{name}.json"):
        hint = f" ({name}.json is here)"
    raise UserError(f"Unknown task {name!r}{hint}: give one of {', '.join(builtin_tasks())} or a template .json file.")


def _maps_texts(words: Any) -> bool:
    return isinstance(words, dict) and all(isinstance(word, str) and word for word in words.values())


def _reader_and_answers(spec: Mapping[str, Any], where: str) -> tuple[str, dict[str, str]]:
    reader = spec.get("reader", "flat")
    if not isinstance(reader, str) or reader not in READERS:
        raise UserError(f"{where}: unknown reader {brief(reader)}; choose from {', '.join(READERS)}.")
    if reader in OWN_ANSWERS:
        if {"verbalizers", "candidates", "label"} & spec.keys():
            raise UserError(f"{where}: reader {reader!r} brings its rows' answers; leave out verbalizers and label.")
        return reader, {}
    if ("verbalizers" in spec) == ("candidates" in spec):
        raise UserError(f"{where}: give either 'verbalizers' or 'candidates', one of the two.")
    if "label" not in spec:
        raise UserError(f"{where}: the template lacks label.")
    answers = spec.get("verbalizers", spec.get("candidates"))
    if not isinstance(answers, dict) or len(answers) < 2 or not all(isinstance(a, str) and a for a in answers.values()):
        raise UserError(f"{where}: verbalizers or candidates must map two or more labels to answer texts.")
    if len(set(answers.values())) < len(answers):
        raise UserError(f"{where}: two labels share one answer text; each label needs its own.")
    return reader, answers


def parse_task(spec: Any, where: str) -> Task:
    """Checks a template's plain data and returns the Task."""
    if not isinstance(spec, dict):
        raise UserError(f"{where}: a template is one JSON object with the keys {', '.join(sorted(_KEYS))}.")
    for key in spec:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, sorted(_KEYS), 1)
            raise UserError(f"{where}: unknown key {brief(key)}" + (f" (did you mean {near[0]!r}?)." if near else "."))
    if missing := sorted(_REQUIRED - spec.keys()):
        raise UserError(f"{where}: the template lacks {', '.join(missing)}.")
    reader, answers = _reader_and_answers(spec, where)
    for key in ("name", "text", "label", "instruction"):
        if key in spec and (not isinstance(spec[key], str) or not spec[key]):
            raise UserError(f"{where}: {key!r} must be non-empty text.")
    plain_name(spec["name"], f"{where}: 'name'")
    for key in ("metrics", "fixed", "attack"):
        if not isinstance(spec.get(key, []), list) or not all(isinstance(name, str) for name in spec.get(key, [])):
            raise UserError(f"{where}: {key!r} must be a list of names.")
    unknown_metrics = [metric for metric in spec["metrics"] if metric not in METRICS]
    if unknown_metrics or not spec["metrics"]:
        raise UserError(f"{where}: metrics {brief(unknown_metrics)} are unknown; choose from {', '.join(METRICS)}.")
    for metric in spec["metrics"]:
        if reader not in NEEDS_READER.get(metric, (reader,)):
            raise UserError(f"{where}: metric {metric!r} needs reader {' or '.join(NEEDS_READER[metric])}.")
    for text in (spec["text"], spec.get("instruction", ""), *answers.values()):
        require_utf8(text, f"{where}: {brief(text)}")
    slots = [(slot[1], slot[2]) for text in (spec["text"], *answers.values()) for slot in SLOT.finditer(text)]
    for _, filter_name in slots:
        if filter_name and filter_name not in _FILTERS:
            raise UserError(f"{where}: unknown filter {brief(filter_name)}; choose from {', '.join(_FILTERS)}.")
    if spec["text"].count(PROMPT_MARK) > 1:
        raise UserError(f"{where}: the text holds {PROMPT_MARK} twice; the prompt stands in one place.")
    in_text = {slot[1] for slot in SLOT.finditer(spec["text"])}
    if not in_text or re.search(r"[{}]", SLOT.sub("", "".join((spec["text"], *answers.values())))):
        raise UserError(
            f"{where}: the text needs a {{field}}, and braces may hold nothing but field or field|filter; a field's "
            "name there is one word of letters, digits and _, so rename a column whose name is not."
        )
    values = spec.get("values", {})
    if not isinstance(values, dict) or not all(_maps_texts(words) for words in values.values()):
        raise UserError(f"{where}: 'values' must map fields to objects of raw value: text.")
    truncate = [] if spec.get("truncate") is None else [spec["truncate"]]
    used = {name for name, _ in slots}
    fixed, attack = spec.get("fixed", []), spec.get("attack", [])
    for key, names, known in (
        ("truncate", truncate, in_text), ("values", values, used), ("fixed", fixed, used), ("attack", attack, in_text)
    ):  # fmt: skip
        for name in names:
            if not isinstance(name, str) or name not in known:
                raise UserError(f"{where}: {key!r} names {brief(name)}, which the text doesn't hold.")
    if never := sorted(set(attack) & {*fixed, *values}):
        raise UserError(f"{where}: 'attack' names {never[0]!r}, which 'fixed' or 'values' keeps as it is.")
    return Task(
        name=spec["name"], text=spec["text"], label=spec.get("label"), metrics=tuple(spec["metrics"]),
        reader=reader,
        answers={canonical_label(key): value for key, value in answers.items()}, truncate=spec.get("truncate"),
        values=spec.get("values", {}), fixed=frozenset(fixed), attack=frozenset(attack),
        instruction=spec.get("instruction"),
    )  # fmt: skip
