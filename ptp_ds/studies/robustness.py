"""How prompts score on rows that are not clean: noise on embeddings, masked words, typos, attacked words.

Every kind of change is a function of a level, drawn from a seed and the row's number: all prompts meet the same ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptp_ds.adapters.served import alone
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import Noise, PerturbSettings
from ptp_ds.perturb.a2t import a2t
from ptp_ds.perturb.mask import mask
from ptp_ds.perturb.neighbours import Neighbours
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.seeding import make_generator
from ptp_ds.studies.landscape import Subject
from ptp_ds.tasks import Task
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import Questions, plan_packs, score_prompts, serve_rows

_LEAST_LETTERS = 4  # of a word that a typo may hit: its first and last letter stay
_BATCH = 16  # rows that are attacked together


@dataclass(frozen=True)
class Bench:
    """What all prompts are tried on. settings: units and sizes for the changes. budget: tokens of a pass."""

    backbone: Backbone
    task: Task
    examples: Sequence[Example]
    settings: PerturbSettings
    budget: int
    seed: int = 0


@dataclass(frozen=True)
class Attacks:
    """An attack's outcome: scores [N, C] of the texts that it left, and counts over rows and words."""

    scores: Tensor
    texts: Sequence[Sequence[int]]
    right: int
    fooled: int
    changed: int
    words: int

    @property
    def success_rate(self) -> float:
        """Rows whose right prediction turned wrong, of those predicted right."""
        return self.fooled / self.right if self.right else 0.0

    @property
    def changed_share(self) -> float:
        """Words that were swapped, of those that might have been."""
        return self.changed / self.words if self.words else 0.0


def scored(
    bench: Bench, subject: Subject, examples: Sequence[Example], delta_of: Callable[[PackedRow], Tensor] | None = None
) -> Tensor:
    """[N, C] scores of the examples with a prompt, on the CPU; delta_of: [T, H] that the rows' embeddings move by."""
    backbone = bench.backbone
    if delta_of is None:
        return score_prompts(backbone, [Questions(subject.trained, examples, subject.rows)], alone(), bench.budget)[0]
    serve_rows(backbone, subject.trained, subject.rows)
    rows = backbone.rows  # one that pads has its own
    trained, shared = subject.trained.to(backbone.device), rows.shared_start(examples)
    shared_ids = torch.tensor(examples[0].context_ids[:shared], dtype=torch.int64, device=backbone.device)
    width = max(len(example.candidate_ids) for example in examples)
    table = torch.full((len(examples), width), float("-inf"))
    with torch.no_grad():
        prefix = backbone.cache_prefix(trained, shared_ids)
        for numbers in plan_packs([rows.length(example) for example in examples], bench.budget, 1):
            row = rows.pack([examples[number] for number in numbers], shared).to(backbone.device)
            inputs = row.moved(backbone.inputs(row, trained), delta_of(row))
            scores = backbone.score(row, inputs, trained, prefix=prefix)[0].cpu()
            table[numbers, : scores.shape[1]] = scores
    return table


def with_noise(bench: Bench, subject: Subject, sigma: float, draw: int) -> Tensor:
    """Scores under normal noise on every movable token, of root-mean-square norm sigma (mean embedding norms).

    It is drawn over the movable tokens alone, as training's isn't: the same whatever prompt stands before them or
    between them.
    """
    width, scale = bench.backbone.width, sigma * bench.settings.unit / bench.backbone.width**0.5

    def delta_of(row: PackedRow) -> Tensor:
        moving = row.movable.nonzero()[:, 0]
        counts = torch.bincount(row.example_of[moving], minlength=row.num_examples).tolist()
        drawn = [
            torch.randn(count, width, generator=make_generator(bench.seed, "noise", draw, number))
            for number, count in zip(row.numbers.tolist(), counts, strict=True)
        ]
        delta = torch.zeros(row.num_tokens, width, device=bench.backbone.device)
        return delta.index_copy(0, moving, scale * torch.cat(drawn).to(delta.device))

    return scored(bench, subject, bench.examples, delta_of if sigma > 0 else None)


def with_masks(bench: Bench, subject: Subject, share: float, draw: int) -> Tensor:
    """Scores with a share of each row's words hidden, at least one; a share of 0 hides none."""
    if share == 0:
        return scored(bench, subject, bench.examples)
    twins = mask(bench.examples, replace(bench.settings, mask_share=share), Noise(bench.seed, draw))
    hidden = [replace(e, context_ids=twin.context_ids) for e, twin in zip(bench.examples, twins, strict=True)]
    return scored(bench, subject, hidden)


def typo(word: str, generator: torch.Generator) -> str:
    """The word with two inner letters swapped or one dropped; a short one as it is."""
    letters = [place for place, letter in enumerate(word) if letter.isalpha()]
    inner = letters[1:-1]
    if len(letters) < _LEAST_LETTERS:
        return word
    kind, where = torch.rand(2, generator=generator).tolist()
    if kind < 0.5 and len(inner) > 1:
        first = inner[int(where * (len(inner) - 1))]
        second = inner[inner.index(first) + 1]
        found = list(word)
        found[first], found[second] = found[second], found[first]
        return "".join(found)
    place = inner[int(where * len(inner))]
    return word[:place] + word[place + 1 :]


def with_typos(
    rows: Sequence[Mapping[str, Any]], fields: Sequence[str], share: float, seed: int
) -> list[dict[str, Any]]:
    """The rows with a share of the words of `fields` misspelt, drawn by the row's place and the field."""
    found = []
    for number, row in enumerate(rows):
        changed = dict(row)
        for field in fields:
            if isinstance(changed.get(field), str):
                changed[field] = _misspelt(changed[field], share, make_generator(seed, f"typo {field}", number))
        found.append(changed)
    return found


def _misspelt(text: str, share: float, generator: torch.Generator) -> str:
    words = text.split(" ")
    return " ".join(
        typo(word, generator) if draw < share else word
        for word, draw in zip(words, torch.rand(len(words), generator=generator).tolist(), strict=True)
    )


def typo_fields(task: Task) -> list[str]:
    """Fields whose words may be misspelt: of the text, in no answer, neither values nor fixed."""
    return [name for name in task.fields if name not in task.fixed_fields | task.answer_fields]


def attacked(bench: Bench, subject: Subject, share: float, neighbours: Neighbours) -> Attacks:
    """Every row attacked by a2t under the prompt, with a share of its words; 0 changes nothing.

    A row whose right answer isn't among its options, as WSC's false ones, stays as it is: its loss is not known.
    """
    backbone, settings = bench.backbone, replace(bench.settings, a2t_share=share)
    serve_rows(backbone, subject.trained, subject.rows)
    texts: list[Sequence[int]] = [example.context_ids for example in bench.examples]
    open_ = [number for number, example in enumerate(bench.examples) if example.trainable]
    sums = dict.fromkeys(("a2t/changed_share", "a2t/success_rate"), (0.0, 0.0))
    with backbone.shards.outside_layers():
        for start in range(0, len(open_), _BATCH):
            numbers = open_[start : start + _BATCH]
            some = [bench.examples[number] for number in numbers]
            shared = backbone.rows.shared_start(some)
            found = a2t(TextScorer(backbone, subject.trained, some, shared, neighbours), settings)
            for number, twin in zip(numbers, found.twins, strict=True):
                texts[number] = twin.context_ids
            sums = {name: tuple(a + b for a, b in zip(sums[name], found.shares[name], strict=True)) for name in sums}  # type: ignore[misc]
    left = [replace(e, context_ids=text) for e, text in zip(bench.examples, texts, strict=True)]
    (changed, words), (fooled, right) = sums["a2t/changed_share"], sums["a2t/success_rate"]
    return Attacks(scored(bench, subject, left), texts, int(right), int(fooled), int(changed), int(words))
