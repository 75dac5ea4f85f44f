"""A run's data: the splits it reads, the examples that train, select, are reported and are predicted; their batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import Rows
from ptp_ds.perturb.a2t import swappable
from ptp_ds.perturb.neighbours import vocabulary_of
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import BatchOrder, BudgetOrder, Split, Tokenised, hold_out, load_split, tokenise
from ptp_ds.tasks.example import Example
from ptp_ds.tasks.predictions import check_numbers


@dataclass(frozen=True)
class RunExamples:
    """train: those with a right answer among their options, of several the first alone. select: those that choose the
    best prompt. evaluation: those that are reported. predict: of predict_split, without labels. truncated: rows that
    had to be shortened. undecided: where rows stand of which a right and a wrong answer are the same tokens.
    """

    train: Sequence[Example]
    select: Sequence[Example]
    evaluation: Sequence[Example]
    truncated: int = 0
    predict_split: Split | None = None
    predict: Sequence[Example] = ()
    undecided: Sequence[str] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest path through an example, without the prompt."""
        parts = (self.train, self.select, self.evaluation, self.predict)
        return max((example.path_length for part in parts for example in part), default=0)


def split_names(run: RunConfig) -> dict[str, str]:
    """The run's labelled splits, by what they are for: train, eval and, where given, select."""
    names = {"train": run.train_split, "eval": run.eval_split}
    return names if run.select_split is None else {**names, "select": run.select_split}


def load_splits(run: RunConfig, task: Task) -> dict[str, Split]:
    """The rows of the run's labelled splits; see split_names."""
    return {name: load_split(task, split, run.data_dir, run.dataset) for name, split in split_names(run).items()}


def run_examples(
    run: RunConfig, task: Task, splits: Mapping[str, Split], tokenizer: Any, room: int, head: str
) -> RunExamples:
    """The splits' rows as examples. room: tokens that fit behind the prompt; head: see tokenise. Raises ValueError."""
    tokenised = {name: tokenise(task, split, tokenizer, room, head=head) for name, split in splits.items()}
    train, select = _train_and_select(run, tokenised)
    predict_split, predict = _to_predict(run, task, tokenizer, room, head)
    truncated = sum(part.truncated for part in tokenised.values())
    undecided = [where for part in tokenised.values() for where in part.undecided]
    return RunExamples(train, select, tokenised["eval"].examples, truncated, predict_split, predict, undecided)


def train_examples(run: RunConfig, task: Task, tokenizer: Any, room: int, head: str) -> Sequence[Example]:
    """What run_examples gives as `train`, without the rows that are reported."""
    names = {name: split for name, split in split_names(run).items() if name != "eval"}
    splits = {name: load_split(task, split, run.data_dir, run.dataset) for name, split in names.items()}
    tokenised = {name: tokenise(task, split, tokenizer, room, head=head) for name, split in splits.items()}
    return _train_and_select(run, tokenised)[0]


def _to_predict(
    run: RunConfig, task: Task, tokenizer: Any, room: int, head: str
) -> tuple[Split | None, Sequence[Example]]:
    """--predict_split's rows, read without labels; ValueError where its prediction file couldn't be written."""
    if run.predict_split is None:
        return None, ()
    split = load_split(task, run.predict_split, run.data_dir, run.dataset)
    examples = tokenise(task, split, tokenizer, room, labelled=False, head=head).examples
    check_numbers(task, split, len(examples))
    return split, examples


def _train_and_select(
    run: RunConfig, tokenised: Mapping[str, Tokenised]
) -> tuple[Sequence[Example], Sequence[Example]]:
    train = tokenised["train"].examples
    if "select" in tokenised:
        select = tokenised["select"].examples
    else:
        kept, held = hold_out(len(train), run.holdout, run.seed, [example.group for example in train])
        train, select = [train[number] for number in kept], [train[number] for number in held]
    train = [_with_one_right(example) for example in train if example.trainable]
    if not train:
        raise UserError(f"No row of split {run.train_split!r} has its right answer among its options; none to learn.")
    return train, select


def _with_one_right(example: Example) -> Example:
    """The example without its right candidates but one, which training would push down for that one's sake."""
    others = {*(example.golds or ())} - {example.gold}
    if not others:
        return example
    kept = [place for place in range(len(example.candidate_ids)) if place not in others]
    gold, names = kept.index(example.gold), [example.names[place] for place in kept] if example.names else ()
    candidates = [example.candidate_ids[place] for place in kept]
    return replace(example, candidate_ids=candidates, names=names, gold=gold, golds=(gold,))


def nothing_to_change(run: RunConfig, train: Sequence[Example], tokenizer: Any) -> list[str]:
    """A sentence where the perturbation finds nothing that it may change in any training row: what it adds is 0 then.

    Looks no further than the first row with something. What a perturbation file makes of texts isn't known.
    """
    how = run.active_perturbation
    if how is None or run.target != "input" or (how.in_text and run.chosen_perturbation.sha256 is not None):
        return []
    if how.attack is not None:
        vocabulary = vocabulary_of(tokenizer)
        if any(swappable(example, vocabulary) for example in train):
            return []
        what = "swaps nothing: no training row has a word of one token that may be swapped (see docs/perturbations.md)"
    elif any(any(example.movable) for example in train):
        return []
    else:
        what = "changes nothing: no training row has a token that may be; leave a field out of 'fixed' and 'values'"
    return [f"--perturbation {run.perturbation} {what}"]


def batch_order(run: RunConfig, rows: Rows, train: Sequence[Example]) -> BatchOrder:
    """The batches of the run's optimizer steps, the same on any number of ranks and micro-batches."""
    if run.tokens_per_step is None:
        return BatchOrder(len(train), run.batch_size, run.seed)
    return BudgetOrder(_step_tokens(run, rows, train), run.tokens_per_step, run.seed)


def _step_tokens(run: RunConfig, rows: Rows, train: Sequence[Example]) -> list[int]:
    """Packed tokens of each example in a step, all streams."""
    shared = rows.shared_start(train)
    return [run.streams * (rows.length(example) - shared) for example in train]


def require_rows_for(run: RunConfig, rows: Rows, train: Sequence[Example], hands: int) -> None:
    """UserError where a batch of --tokens_per_step holds fewer rows than hands: a rank's micro-batch needs one.

    hands: ranks times micro-batches of each.
    """
    if run.tokens_per_step is None or hands == 1:
        return
    lengths = _step_tokens(run, rows, train)
    enough = sum(sorted(2 * lengths)[-hands:])  # a batch from one epoch into the next may hold a row twice
    if len(train) >= hands and enough <= run.tokens_per_step:
        return
    order = batch_order(run, rows, train)
    count, step = min((len(order.batch(step)), step) for step in range(-(-run.max_steps // run.batch_repeats)))
    if count < hands:
        more = f"--tokens_per_step {enough}, which is always enough, or " if len(train) >= hands else ""
        raise UserError(
            f"--tokens_per_step {run.tokens_per_step} holds {count} of the {len(train)} training rows in batch "
            f"{step + 1}, and each of the {hands} micro-batches (ranks times --gradient_accumulation_steps) needs a "
            f"row; give {more}fewer ranks or a smaller --gradient_accumulation_steps."
        )
