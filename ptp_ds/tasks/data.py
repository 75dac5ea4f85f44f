"""Rows from folders of files or the hub, tokenised examples, and the seeded order in which training sees them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptp_ds.errors import UserError
from ptp_ds.files import is_file, is_folder, listed, plain_name
from ptp_ds.ranks.once import first_of_host
from ptp_ds.seeding import make_generator
from ptp_ds.tasks import NoLabelError, Rendered, Task
from ptp_ds.tasks.answers import IN_ORDER, answer_ids, require_distinct, told_apart, undecided
from ptp_ds.tasks.example import Example
from ptp_ds.tasks.hub_rows import official_rows
from ptp_ds.tasks.hub_table import load_table
from ptp_ds.tasks.rows import ENDINGS, FORMATS, STANDARD_INPUT, rows_of_file, rows_of_standard_input
from ptp_ds.tasks.words import words_of_tokens

DEMO_DATA = Path(__file__).parent / "demo_data"
_MOST_CHARACTERS = 1 << 27  # of a row's context, once for each answer
_HUB_SPLITS = {"val": "validation"}  # SuperGLUE's files say val, its hub repositories validation


@dataclass(frozen=True)
class Split:
    """Rows of one split. where[i] names row i for messages (file:line). digest: sha256 over the rows."""

    rows: Sequence[Mapping[str, Any]]
    where: Sequence[str]
    digest: str


def load_split(task: Task, split: str, data_dir: str | None, dataset: str | None) -> Split:
    """The rows of `<data_dir>/<task>/<split>.jsonl` (else .csv, else .tsv: see ptp_ds.tasks.rows), or of a hub dataset;
    with neither, of the packaged demo data.

    Raises ValueError for a missing file, a malformed line (with its number), a split with no rows.
    """
    if data_dir is not None and dataset is not None:
        raise UserError("Can't read both --data_dir and --dataset; choose one.")
    if dataset is not None:
        source: str | Path = f"--dataset {dataset}"
        rows, where = _read_hub(task, split, dataset)
    else:
        source = _find_file(task, split, data_dir)
        rows, where = rows_of_file(source)
    if not rows:
        raise UserError(f"{source}: split {split!r} of task {task.name} has no rows; give one with at least one.")
    return _split_of(rows, where)


def load_rows(file: str) -> Split:
    """The rows of one file of a user's own (see ptp_ds.tasks.rows), or of standard input, JSON lines, for "-".

    Raises ValueError for a missing file, a malformed line, no rows.
    """
    if file == STANDARD_INPUT:
        rows, where = rows_of_standard_input()
    elif is_file(file):
        rows, where = rows_of_file(Path(file))
    else:
        raise UserError(f"--input {file}: there is no such file; give {FORMATS}, or - for standard input.")
    if not rows:
        raise UserError(f"--input {file} has no rows; give a file with at least one.")
    return _split_of(rows, where)


def _split_of(rows: Sequence[Mapping[str, Any]], where: Sequence[str]) -> Split:
    canonical = "\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in rows)
    return Split(rows, where, hashlib.sha256(canonical.encode()).hexdigest())


def _find_file(task: Task, split: str, data_dir: str | None) -> Path:
    folder = DEMO_DATA if data_dir is None else Path(data_dir)
    if is_file(folder):
        raise UserError(
            f"--data_dir {folder} is a file; give the folder above {task.name}/, which holds files such as "
            f"{task.name}/{split}.csv."
        )
    if not is_folder(folder):
        raise UserError(f"--data_dir {folder}: there is no such folder.")
    stem = plain_name(split, "The split")
    for ending in ENDINGS:
        if is_file(file := folder / task.name / f"{stem}{ending}"):
            return file
    if not is_folder(folder / task.name):
        raise UserError(_no_folder(task, folder, data_dir is None))
    files = sorted(path for path in (folder / task.name).iterdir() if path.suffix.lower() in ENDINGS)
    if named := [path for path in files if path.stem == stem and is_file(path)]:  # train.CSV
        return named[0]
    found, file = sorted({path.stem for path in files}), folder / task.name / f"{stem}{ENDINGS[0]}"
    raise UserError(f"No file {file}; splits there ({', '.join(ENDINGS)}): {listed(found) or 'none'}.")


def _no_folder(task: Task, folder: Path, demo: bool) -> str:
    """The sentence for a folder without one of the task's name."""
    found = sorted(path.name for path in folder.iterdir() if is_folder(path))
    if demo:
        known = f"the packaged demo data; it holds {listed(found)}"
        return f"No folder {task.name!r} in {known}; give --data_dir or --dataset."
    if files := sorted(path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS and is_file(path)):
        return (
            f"No folder {task.name!r} in --data_dir {folder}; it holds {listed(files)} itself. Give the folder above "
            f"it, and name this one {task.name}."
        )
    return f"No folder {task.name!r} in --data_dir {folder}; it holds {listed(found) or 'no folders'}."


def _read_hub(task: Task, split: str, dataset: str) -> tuple[list[dict], list[str]]:
    name = _HUB_SPLITS.get(split, split)
    with first_of_host(f"data set {dataset} {task.name} {name}"):
        table, configuration = load_table(dataset, task.name, name)
    rows = with_class_labels([dict(row) for row in table], table.features, task, f"--dataset {dataset}")
    return official_rows(rows, task.reader, f"{dataset}/{configuration}/{name}")


def with_class_labels(rows: list[dict], features: Any, task: Task, where: str) -> list[dict]:
    """The rows of a `datasets` table with the template's labels in the place of a datasets.ClassLabel's numbers.

    Numbers without a class, as unlabelled rows have, stay. features: the table's, None for rows that have none.
    """
    names = getattr(features.get(task.label), "names", None) if isinstance(features, Mapping) and task.label else None
    if not names:
        return rows
    assert task.label is not None
    labels = _labels_of_classes(names, task, where)
    for row in rows:
        value = row.get(task.label)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
            row[task.label] = labels[value]
    return rows


def _labels_of_classes(names: Sequence[str], task: Task, where: str) -> list[str]:
    """The label of each class: its name, in any case, or its number; one of the two for all classes of a table.

    A name may be another class's number ("1" to "5"), so the two can't be told apart class by class.
    """
    by_lower = {label.lower(): label for label in task.labels}
    by_name = [name if name in task.labels else by_lower.get(name.lower()) for name in names]
    by_number = [str(number) if str(number) in task.labels else None for number in range(len(names))]
    if None not in by_name or not any(by_number):  # a class that the template lacks is an error where a row has it
        return [label or name for label, name in zip(by_name, names, strict=True)]
    if None not in by_number:
        return [str(number) for number in range(len(names))]
    raise UserError(
        f"{where}: the classes of {task.label!r} are {listed(names)}, the labels of task {task.name} "
        f"{listed(task.labels)}; give the template the classes' names as labels, or their numbers from 0 on."
    )


@dataclass(frozen=True)
class Tokenised:
    """A split ready for packing. shortened: where each row stands that was shortened. ended: how many have answers with
    an end. undecided: where each row stands of which a right and a wrong answer are the same tokens."""

    examples: Sequence[Example]
    shortened: Sequence[str]
    ended: int
    undecided: Sequence[str] = ()

    @property
    def truncated(self) -> int:
        """How many rows were shortened."""
        return len(self.shortened)


def is_labelled(task: Task, split: Split) -> bool:
    """Whether any row says what is right; official test splits don't. Raises ValueError for rows that are wrong."""
    for row, where in zip(split.rows, split.where, strict=True):
        try:
            task.entries(row, where)
            return True
        except NoLabelError:
            continue
    return False


def tokenise(
    task: Task, split: Split, tokenizer: Any, max_length: int, labelled: bool = True, head: str = "causal"
) -> Tokenised:
    """Examples of a split. max_length: tokens that fit behind the prompt, answers included.

    labelled: every row must have its label; without, labels are not read, and the examples are for prediction alone.
    head: the kind that scores the answers; where it does so token by token, see told_apart.

    A longer row loses tokens from the middle of the task's `truncate` field only. Raises ValueError where that can't
    make it fit, where the tokenizer gives no offsets, where a context and its answers share a token, where two labels'
    answers are the same tokens (unless the model scores classes), or told_apart's.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed.")
    entries: list[tuple[Rendered, str]] = []
    for row, where in zip(split.rows, split.where, strict=True):
        for entry in task.entries(row, where, labelled):
            if len(entry.context) * len(entry.candidates) > _MOST_CHARACTERS:
                raise UserError(
                    f"{where}: {len(entry.candidates)} answers behind a context of {len(entry.context)} characters are "
                    f"more than the {_MOST_CHARACTERS} characters that a row may come to."
                )
            entries.append((entry, where))
    contexts = _encode(tokenizer, [entry.context for entry, _ in entries])
    texts = [entry.context + answer for entry, _ in entries for answer in entry.candidates]
    answered = iter(_encode(tokenizer, texts))
    examples, shortened, same, ended = [], [], [], 0
    groups: dict[Any, int] = {}
    for number, ((entry, where), (ids, offsets)) in enumerate(zip(entries, contexts, strict=True)):
        candidates = [answer_ids(ids, next(answered)[0], where) for _ in entry.candidates]
        if task.choice:
            same += [where] if undecided(candidates, entry.golds) else []
        elif head != "classes":
            require_distinct(candidates, entry.candidates, where)
        if head in IN_ORDER:
            candidates, needed = told_apart(candidates, entry.candidates, tokenizer, where)
            ended += needed
        fields = _field_of_tokens(entry, offsets)
        words = words_of_tokens(entry.context, offsets, fields)
        movable = [name is not None and name not in task.fixed_fields for name in fields]
        attackable = [moves and task.attacks(name) for moves, name in zip(movable, fields, strict=True)]
        excess = len(ids) + max(map(len, candidates)) - 1 - max_length
        keep = _kept(task, fields, max(0, excess), max_length, where)
        shortened += [where] if excess > 0 else []
        examples.append(Example(
            context_ids=[ids[place] for place in keep], movable=[movable[place] for place in keep],
            candidate_ids=candidates, gold=entry.gold, index=number, golds=entry.golds, names=entry.names,
            group=-1 if entry.key is None else groups.setdefault(entry.key, len(groups)), label=entry.label,
            words=[words[place] for place in keep], attackable=[attackable[place] for place in keep],
            prompt_at=sum(offsets[place][1] <= entry.prompt_at for place in keep) if entry.prompt_at else 0,
        ))  # fmt: skip
    return Tokenised(examples, shortened, ended, same)


def tail_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts behind a text."""
    ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    return tuple(ids[len(_encode(tokenizer, ["a"])[0][0]) :])


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, character offsets) of each text with the tokenizer's own leading special tokens, none behind."""
    batch = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=True)
    encoded = []
    for ids, offsets, special in zip(
        batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
    ):
        end = len(ids)
        while end and special[end - 1]:
            end -= 1
        encoded.append((list(ids[:end]), list(offsets[:end])))
    return encoded


def _field_of_tokens(row: Rendered, offsets: Sequence[tuple[int, int]]) -> list[str | None]:
    """Each token's field, None for template and special tokens and for tokens that straddle a border."""
    context = row.context
    field_of_char: list[str | None] = []
    for text, name in row.pieces:
        field_of_char.extend([name] * len(text))
    fields: list[str | None] = []
    for start, end in offsets:
        first = start
        while first < end and context[first].isspace():
            first += 1
        names = set(field_of_char[first if first < end else start : end])  # spaces alone: the field that they lie in
        fields.append(names.pop() if len(names) == 1 else None)
    return fields


def _kept(task: Task, fields: list[str | None], excess: int, max_length: int, where: str) -> list[int]:
    """The context's places without `excess` of them, taken from the middle of the task's `truncate` field."""
    if not excess:
        return list(range(len(fields)))
    positions = [position for position, name in enumerate(fields) if name == task.truncate and name is not None]
    if len(positions) <= excess:
        if task.truncate is None:
            raise UserError(
                f"{where}: the row is {excess} tokens longer than the {max_length} that fit behind the prompt, and "
                f"task {task.name} names no field to shorten; set 'truncate' in its template."
            )
        raise UserError(
            f"{where}: the row is {excess} tokens longer than the {max_length} that fit behind the prompt, and its "
            f"field {task.truncate!r} can't give them; use a shorter prompt, a larger --max_length or shorter rows."
        )
    first = (len(positions) - excess) // 2 + (len(positions) - excess) % 2
    dropped = set(positions[first : first + excess])
    return [position for position in range(len(fields)) if position not in dropped]


def hold_out(count: int, share: float, seed: int, groups: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Row numbers for (training, selection): a seeded share of the training rows, at least one each.

    groups: each row's group, -1 for none; rows of one group (a question's answers) stay together.
    """
    units: dict[tuple[bool, int], list[int]] = {}
    for number, group in enumerate(groups or [-1] * count):
        units.setdefault((group >= 0, group if group >= 0 else number), []).append(number)
    count = len(units)
    if count < 2:
        raise UserError(f"Can't hold out rows for selection from {count} training row; give --select_split.")
    order = torch.randperm(count, generator=make_generator(seed, "hold_out")).tolist()
    size = min(max(1, round(count * share)), count - 1)
    members = list(units.values())
    kept, held = ([number for unit in part for number in members[unit]] for part in (order[size:], order[:size]))
    return sorted(kept), sorted(held)


class BatchOrder:
    """The endless, seeded sequence of training rows: epoch after epoch, each shuffled anew; stateless to resume."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def batch(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step` (0-based), the whole global batch."""
        start = step * self.batch_size
        return self._rows(start, start + self.batch_size)

    def _rows(self, start: int, stop: int) -> list[int]:
        return [self._at(position) for position in range(start, stop)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        return self._epoch(epoch)[offset]

    def _epoch(self, epoch: int) -> list[int]:
        if getattr(self, "_cached", (None,))[0] != epoch:
            generator = make_generator(self.seed, "order", epoch)
            self._cached = (epoch, torch.randperm(self.count, generator=generator).tolist())
        return self._cached[1]


class BudgetOrder(BatchOrder):
    """The same sequence cut into batches that fill a token budget, whatever their number of rows.

    lengths: packed tokens of each row, all streams; one that exceeds the budget is a batch of its own. The cuts follow
    from the seed and the lengths alone, so a step is found again without any state.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int) -> None:
        super().__init__(len(lengths), 1, seed)
        self.lengths, self.budget = lengths, budget
        self._cuts = [0]

    def batch(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step`: as many as fit the budget, at most one epoch."""
        while len(self._cuts) <= step + 1:
            self._cuts.append(self._next_cut(self._cuts[-1]))
        return self._rows(self._cuts[step], self._cuts[step + 1])

    def _next_cut(self, start: int) -> int:
        stop, tokens = start, 0
        while stop - start < self.count:
            tokens += self.lengths[self._at(stop)]
            if tokens > self.budget and stop > start:
                break
            stop += 1
        return stop


def deal_rows(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Deals positions 0..n-1 to `hands`, longest first and back and forth, so token counts balance.

    Where n is a multiple of hands all get equally many, else some one more. The split depends on the lengths alone, and
    each hand keeps the batch's order.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for number, position in enumerate(order):
        turn, place = divmod(number, hands)
        dealt[place if turn % 2 == 0 else hands - 1 - place].append(position)
    return [sorted(hand) for hand in dealt]
