"""scripts/robustness.py: trained prompts under noise, masks, typos and attacks, as a table, curves and numbers."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from torch import Tensor

from ptp_ds.adapters.read import adapter_folder
from ptp_ds.adapters.served import Served
from ptp_ds.adapters.task import adapter_task
from ptp_ds.commands.exits import run_command
from ptp_ds.commands.landscape import Opened, open_adapters, require_counts
from ptp_ds.config.parsers import LEVELS, robustness_parser
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import require_writable_folder, write_json
from ptp_ds.perturb import PerturbSettings
from ptp_ds.perturb.mask import mask_token_id
from ptp_ds.perturb.neighbours import Neighbours, vocabulary_of
from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.ranks.log import get_logger
from ptp_ds.studies.landscape import Subject
from ptp_ds.studies.pictures import curves, require_plot_extra
from ptp_ds.studies.robustness import Bench, attacked, scored, typo_fields, with_masks, with_noise, with_typos
from ptp_ds.tasks.data import Split
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import evaluation_of

log = get_logger(__name__)
Scores = Callable[[Subject, float, int], tuple[Tensor, Sequence[Example], dict[str, float]]]


def _parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    args = robustness_parser(description).parse_args(argv)
    require_counts(args, ("rows", "draws", "eval_tokens"))
    for kind in LEVELS:
        most = 1.0 if kind != "noise" else 1e6
        for level in getattr(args, kind):
            if not 0 <= level <= most:
                raise UserError(f"--{kind} {level:g}: expected numbers from 0 to {most:g}.")
    return args


def _kinds(args: argparse.Namespace) -> list[str]:
    """The kinds of changes that the adapters' task has; UserError where it has none of --kinds, by its card alone."""
    task = adapter_task(adapter_folder(args.adapters[0]), None)
    if task.of_fields or "typos" not in args.kinds:
        return list(args.kinds)
    if kinds := [kind for kind in args.kinds if kind != "typos"]:
        log.warning("warning: rows of task %s are more than fields of text; typos are left out", task.name)
        return kinds
    raise UserError(
        f"--kinds typos: rows of task {task.name} are more than fields of text, which alone can be misspelt; give "
        f"{', '.join(kind for kind in LEVELS if kind != 'typos')}."
    )


def _bench(args: argparse.Namespace, served: Served, opened: Opened) -> Bench:
    defaults = RunConfig()
    settings = PerturbSettings(
        unit=opened.backbone.mean_embedding_norm(), sigma=0.0, epsilon=0.0, alpha=0.0, steps=0, norm=defaults.norm,
        divergence=defaults.divergence, mask_id=mask_token_id(served.source.tokenizer, None), kernels=defaults.kernels,
    )  # fmt: skip
    return Bench(opened.backbone, served.task, opened.examples, settings, args.eval_tokens, args.seed)


class _Changes:
    """Each kind of change: scores of the changed rows, those rows, and what else is told."""

    def __init__(self, args: argparse.Namespace, served: Served, bench: Bench, split: Split) -> None:
        self.args, self.served, self.bench, self.split = args, served, bench, split
        self._neighbours: Neighbours | None = None

    def noise(self, subject: Subject, level: float, draw: int) -> tuple[Tensor, Sequence[Example], dict[str, float]]:
        return with_noise(self.bench, subject, level, draw), self.bench.examples, {}

    def masks(self, subject: Subject, level: float, draw: int) -> tuple[Tensor, Sequence[Example], dict[str, float]]:
        return with_masks(self.bench, subject, level, draw), self.bench.examples, {}

    def typos(self, subject: Subject, level: float, draw: int) -> tuple[Tensor, Sequence[Example], dict[str, float]]:
        fields = typo_fields(self.bench.task)
        rows = with_typos(self.split.rows, fields, level, self.args.seed + draw)
        found = self.served.examples(Split(rows, self.split.where, self.split.digest), labelled=True)
        examples = found[: self.args.rows]
        return scored(self.bench, subject, examples), examples, {}

    def attack(self, subject: Subject, level: float, draw: int) -> tuple[Tensor, Sequence[Example], dict[str, float]]:
        if self._neighbours is None:
            defaults = RunConfig()
            self._neighbours = Neighbours(
                vocabulary_of(self.served.source.tokenizer), defaults.a2t_neighbours, defaults.a2t_min_cosine
            )
        found = attacked(self.bench, subject, level, self._neighbours)
        told = {"success_rate": found.success_rate, "changed_share": found.changed_share, "right": float(found.right),
                "fooled": float(found.fooled)}  # fmt: skip
        return found.scores, self.bench.examples, told


def _rows(args: argparse.Namespace, changes: _Changes, subjects: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """One line a prompt, kind and level: its score, mean over draws."""
    for subject in subjects:
        for kind in args.kinds:
            of_kind: Scores = getattr(changes, kind)
            for level in getattr(args, kind):
                draws = 1 if kind == "attack" or level == 0 else args.draws
                scores: list[float] = []
                told: dict[str, float] = {}
                for draw in range(draws):
                    scores_NC, examples, told = of_kind(subject, level, draw)
                    scores.append(evaluation_of(scores_NC, examples, changes.bench.task).score)
                line = {"adapter": subject.name, "kind": kind, "level": level, "score": mean(scores), **told}
                log.info("  %s", _shown(line))
                yield line


def _shown(line: dict[str, Any]) -> str:
    told = f"{line['adapter']:24} {line['kind']:7} {line['level']:5.2f}  score {line['score']:.3f}"
    if "success_rate" not in line:
        return told
    return f"{told}  success rate {line['success_rate']:.3f}, words changed {line['changed_share']:.3f}"


def _robustness(args: argparse.Namespace) -> None:
    require_plot_extra()
    out = require_writable_folder("--output_dir", args.output_dir)
    args.kinds = _kinds(args)
    served, opened = open_adapters(args, trainable=False)
    log.info("%s, %d rows, %d prompts", served.task.name, len(opened.examples), len(opened.subjects))
    lines = list(_rows(args, _Changes(args, served, _bench(args, served, opened), opened.split), opened.subjects))
    write_json(out / "robustness.json", {"task": served.task.name, "rows": len(opened.examples), "lines": lines})
    panels = {
        kind: {
            subject.name: [(line["level"], line["score"]) for line in lines
                           if (line["kind"], line["adapter"]) == (kind, subject.name)]
            for subject in opened.subjects
        }
        for kind in dict.fromkeys(line["kind"] for line in lines)
    }  # fmt: skip
    curves(out / "robustness.png", panels, {kind: text for kind, (_, text) in LEVELS.items()})
    log.info("table, curves: %s", out)


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    prepare_environment()
    return run_command(lambda: _robustness(_parse(sys.argv[1:] if argv is None else argv, description)))
