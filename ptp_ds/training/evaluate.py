"""Scoring a split with a prompt: packed to a token budget, shared out over ranks, exact whatever their number."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.objective import cross_entropy_sum, log_probabilities
from ptp_ds.packing.forest import join_rows, parts
from ptp_ds.packing.layouts import Rows
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.tasks import Outcome, Task, compute_metrics, majority_accuracy
from ptp_ds.tasks.example import Example


@dataclass(frozen=True)
class Evaluation:
    """metrics: the task's, as fractions of 1. score: their mean. majority: accuracy of the most frequent answer."""

    metrics: dict[str, float]
    score: float
    cross_entropy: float
    majority: float
    examples: int

    def within_an_error_of(self, highest: float) -> bool:
        """Whether the score lies at most one standard error below `highest`; see `least_score`."""
        return self.score >= least_score(highest, self.examples)

    @property
    def shown(self) -> str:
        """The metrics for a line of the console."""
        return "  ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dict(vars(self))


def least_score(highest: float, rows: int) -> float:
    """The least score of a prompt that is kept for a later one's sake, where the highest so far is `highest`.

    One standard error below it: that of a share of right answers on `rows` rows, with one right and one wrong answer
    added so that it isn't 0 where all are right. On few rows the highest of many scores is mostly luck, and the later
    prompt, trained at a lower learning rate, is the better one on other rows (docs/defaults.md).
    """
    share = (min(max(highest, 0.0), 1.0) * rows + 1) / (rows + 2)
    return highest - sqrt(share * (1 - share) / rows)


def plan_packs(
    lengths: Sequence[int], budget: int, ranks: int, owners: Sequence[int] = (), prefixes: Sequence[int] = ()
) -> list[list[int]]:
    """Numbers of the units of each pass: longest first, up to `budget` tokens, a multiple of `ranks` passes.

    Under ZeRO-3 every rank must run as many passes as the others, so the last pack is split or repeated to fill up.
    owners: each unit's prompt, whose units stay together; prefixes: tokens that each prompt takes of a pass.
    """
    owners, prefixes = owners or [0] * len(lengths), prefixes or [0] * (max(owners, default=0) + 1)
    packs: list[list[int]] = []
    free = 0
    for number in sorted(range(len(lengths)), key=lambda number: (owners[number], -lengths[number])):
        alone = lengths[number] + prefixes[owners[number]]
        joins = packs and owners[packs[-1][-1]] == owners[number]
        needed = lengths[number] if joins else alone
        if not packs or needed > free:
            packs.append([])
            free, needed = budget, alone
        packs[-1].append(number)
        free -= needed
    while len(packs) % ranks:
        largest = max(packs, key=len)
        if len(largest) > 1:
            packs.append(largest[1::2])
            del largest[1::2]
        else:
            packs.append(list(largest))
    return packs


@dataclass(frozen=True)
class Questions:
    """Examples that one prompt is scored on. trained: it, and its head's rows, if any. rows: how it lays them out."""

    trained: Tensor
    examples: Sequence[Example]
    rows: Rows


def serve_rows(backbone: Backbone, trained: Tensor, rows: Rows) -> None:
    """From now on the backbone's rows are those of this prompt. trained: it and its head's rows, if any."""
    backbone.serve(backbone.prompt, rows, trained.shape[0] - backbone.head.rows(trained.shape[1]))


def score_prompts(
    backbone: Backbone, asked: Sequence[Questions], ranks: Ranks, budget: int, beat: Callable[[], None] | None = None
) -> list[Tensor]:
    """score_examples for several prompts, in passes that hold rows of several where they can share one.

    A pass also holds the prompts of its rows, so nothing is cached and nothing computed or gathered for it alone.
    """
    if len(asked) > 1 and backbone.shares_passes:
        with torch.no_grad():
            return _score_together(backbone, asked, ranks, budget, beat)
    found = []
    for one in asked:
        serve_rows(backbone, one.trained, one.rows)
        found.append(score_examples(backbone, one.trained, one.examples, ranks, budget, beat))
    return found


def _score_together(
    backbone: Backbone, asked: Sequence[Questions], ranks: Ranks, budget: int, beat: Callable[[], None] | None
) -> list[Tensor]:
    units, lengths, prefixes = [], [], []
    prompts, shared = [one.trained.to(ranks.device) for one in asked], []
    for owner, one in enumerate(asked):
        shared.append(one.rows.shared_start(one.examples))
        prefixes.append(one.trained.shape[0] + shared[-1])
        for group in one.rows.groups(one.examples, budget):
            units.append((owner, group))
            lengths.append(one.rows.group_length([one.examples[number] for number in group]))
    tables = [_Table.of(one.examples) for one in asked]
    packs = plan_packs(lengths, budget, ranks.world, [owner for owner, _ in units], prefixes)
    found = []  # read when all passes are launched: a GPU waits for no row's packing
    for pack in packs[ranks.rank :: ranks.world]:
        owned: dict[int, list[list[int]]] = {}
        for unit in pack:
            owned.setdefault(units[unit][0], []).append(units[unit][1])
        rows = [
            asked[owner].rows.pack_groups([[asked[owner].examples[number] for number in group] for group in groups],
                                          shared[owner])
            for owner, groups in owned.items()
        ]  # fmt: skip
        trained = torch.cat([prompts[owner] for owner in owned])
        row = join_rows(rows, [prompts[owner].shape[0] for owner in owned]).to(ranks.device)
        scores = backbone.score(row, backbone.inputs(row, trained), trained)[0]
        for (owner, groups), own, scored in zip(owned.items(), rows, parts(row, rows, scores), strict=True):
            found.append((tables[owner], [number for group in groups for number in group], scored, own.present))
        if beat is not None:
            beat()
    for table, numbers, scored, present in found:
        table.add(numbers, scored.cpu(), present)
    return _reduced(tables, ranks)


@dataclass(frozen=True)
class _Table:
    """Sums of a rank's scores [N, C], and how often it scored each example [N, 1]; absent: [N, C] no candidates."""

    sums: Tensor
    counts: Tensor
    absent: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "_Table":
        sizes = torch.tensor([len(example.candidate_ids) for example in examples])
        absent = torch.arange(int(sizes.max())) >= sizes[:, None]
        sums, counts = (torch.zeros(shape, dtype=torch.float32) for shape in (absent.shape, (len(examples), 1)))
        return cls(sums, counts, absent)

    def add(self, numbers: Sequence[int], scores_BC: Tensor, present_BC: Tensor) -> None:
        """Scores of the examples `numbers`."""
        self.sums[numbers, : scores_BC.shape[1]] += scores_BC.masked_fill(~present_BC, 0.0)
        self.counts[numbers] += 1


def _reduced(tables: Sequence[_Table], ranks: Ranks) -> list[Tensor]:
    """Each table's mean scores over all ranks, -inf where a candidate is absent: one collective for all."""
    flat = torch.cat([torch.cat([table.sums, table.counts], dim=1).flatten() for table in tables])
    whole = ranks.sum(flat.to(ranks.device)).cpu().split([table.sums.numel() + len(table.counts) for table in tables])
    found = []
    for table, values in zip(tables, whole, strict=True):
        sums, counts = values.view(len(table.counts), -1).split([table.sums.shape[1], 1], dim=1)
        found.append((sums / counts).masked_fill(table.absent, float("-inf")))
    return found


def score_examples(
    backbone: Backbone, trained: Tensor, examples: Sequence[Example], ranks: Ranks, budget: int,
    beat: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """[N, C] fp32 candidate log-probabilities on the CPU, the same on every rank; -inf where a candidate is absent.

    The keys and values of the prompt, and of what all rows begin with, are computed once. All ranks must call it.
    beat: called after each pass (see Watchdog).
    """
    table, rows = _Table.of(examples), backbone.rows
    with torch.no_grad():
        trained, shared = trained.to(ranks.device), rows.shared_start(examples)
        shared_ids = torch.tensor(examples[0].context_ids[:shared], dtype=torch.int64, device=ranks.device)
        prefix = backbone.cache_prefix(trained, shared_ids)
        groups = rows.groups(examples, budget)
        lengths = [rows.group_length([examples[number] for number in group]) for group in groups]
        found = []  # read when all passes are launched: a GPU waits for no row's packing
        for units in plan_packs(lengths, budget, ranks.world)[ranks.rank :: ranks.world]:
            numbers = [number for unit in units for number in groups[unit]]
            row = rows.pack_groups([[examples[number] for number in groups[unit]] for unit in units], shared)
            present, row = row.present, row.to(ranks.device)
            scores = backbone.score(row, backbone.inputs(row, trained), trained, prefix=prefix)[0]
            found.append((numbers, scores, present))
            if beat is not None:
                beat()
        for numbers, scores, present in found:
            table.add(numbers, scores.cpu(), present)
    return _reduced([table], ranks)[0]


def ensemble_scores(scores: Sequence[Tensor]) -> Tensor:
    """[N, C] of an ensemble of prompts: the log of their mean probabilities; one prompt's scores as they are."""
    if len(scores) == 1:
        return scores[0]
    return torch.logsumexp(torch.stack([log_probabilities(scores_NC) for scores_NC in scores]), 0) - log(len(scores))


def evaluate(
    backbone: Backbone, trained: Tensor, examples: Sequence[Example], task: Task, ranks: Ranks, budget: int,
    beat: Callable[[], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Metrics of a split; all ranks must call it. beat: see score_examples."""
    scores_NC = score_examples(backbone, trained, examples, ranks, budget, beat)
    return evaluation_of(scores_NC, examples, task)


def evaluation_of(scores_NC: Tensor, examples: Sequence[Example], task: Task) -> Evaluation:
    """Metrics from candidate log-probabilities."""
    chosen = scores_NC.argmax(-1).tolist()
    outcome = outcome_of(chosen, examples, task.positive)
    metrics = compute_metrics(task.metrics, outcome)
    known = [number for number, example in enumerate(examples) if example.trainable]
    gold = torch.tensor([examples[number].gold for number in known])
    loss = cross_entropy_sum(scores_NC[known], gold).item() / len(known) if known else 0.0
    majority = majority_accuracy(outcome.gold)
    return Evaluation(metrics, sum(metrics.values()) / len(metrics), loss, majority, len(examples))


def majority_metrics(examples: Sequence[Example], task: Task) -> dict[str, float]:
    """The task's metrics where all rows are given the answer that is right most often; of several, the one that scores
    highest. Where rows have options of their own it is the option in that place, the last for a row with fewer.
    """
    counts = Counter(outcome_of([0] * len(examples), examples).gold)
    most = max(counts.values())
    found = []
    for answer in sorted(answer for answer, count in counts.items() if count == most):
        chosen = [_place_of(answer, example) for example in examples]
        found.append(compute_metrics(task.metrics, outcome_of(chosen, examples, task.positive)))
    return max(found, key=lambda metrics: sum(metrics.values()))


def _place_of(answer: int, example: Example) -> int:
    """The candidate by which an answer, as outcome_of counts them, is given to a row."""
    place = answer if example.label is None else 1 - answer  # there 1 says that the first candidate is right
    return min(place, len(example.candidate_ids) - 1)


def outcome_of(chosen: Sequence[int], examples: Sequence[Example], positive: int = 1) -> Outcome:
    """Chosen candidates as official labels and answers. positive: see Task.positive."""
    predicted, gold, answers = [], [], []
    for choice, example in zip(chosen, examples, strict=True):
        by_label = example.label is not None
        predicted.append(int(choice == 0) if by_label else choice)
        gold.append(example.label if example.label is not None else example.gold)
        if example.names:
            right = [example.names[place] for place in example.golds or ()]
            answers.append((example.names[choice], right))
    return Outcome(predicted, gold, [example.group for example in examples], answers, positive)
