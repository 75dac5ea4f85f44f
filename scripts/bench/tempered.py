#!/usr/bin/env python
"""What a temperature would do for a study's prompts: cross-entropy on the reported rows before and behind one.

    python scripts/bench/tempered.py runs/few_shot/cells/MPQA/plain runs/few_shot/cells/MPQA/ptp-rn

Each prompt's scores are divided by the temperature at which the cross-entropy of its selection rows is lowest (Guo et
al. 2017): what a user can do without a perturbation, with the rows that chose the prompt. Accuracy stays as it is. For
cells whose runs had a --select_split, of one backbone.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ptp_ds.adapters.origin import adapter_rows
from ptp_ds.adapters.served import Served, alone, serve, whole
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.exits import run_command
from ptp_ds.commands.members import said_once
from ptp_ds.errors import UserError
from ptp_ds.objective import cross_entropy_sum
from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.studies.report import shown_score
from ptp_ds.studies.statistics import spread_of
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import Questions, score_prompts

_MOST = 1000.0  # times hotter or colder than 1 that a temperature may be: without a wrong row there is no lowest one


@dataclass(frozen=True)
class Outcome:
    """One prompt's cross-entropy on the reported rows, in nats a row, before and behind its temperature."""

    before: float
    behind: float
    temperature: float


def nats(scores_NC: Tensor, gold_N: Tensor, temperature: float = 1.0) -> float:
    """Mean cross-entropy of scores that are divided by a temperature."""
    return float(cross_entropy_sum(scores_NC.double() / temperature, gold_N)) / len(gold_N)


def fitted(scores_NC: Tensor, gold_N: Tensor) -> float:
    """The temperature of the lowest cross-entropy, which has one lowest place in 1 / temperature."""
    most = math.log(_MOST)
    found = minimize_scalar(
        lambda log_of: nats(scores_NC, gold_N, math.exp(log_of)), bounds=(-most, most), method="bounded",
        options={"xatol": 1e-4},
    )  # fmt: skip
    return math.exp(found.x)


def members_of(cell: Path) -> list[Path]:
    """The folders of a cell's members that have a result; UserError where there is none."""
    found = sorted((file.parent for file in cell.glob("members/*/result.json")), key=lambda one: (len(one.name), one))
    if not found:
        raise UserError(f"{cell} holds no members/*/result.json; give folders of a study's cells, cells/TASK/METHOD.")
    return found


def selection_split(member: Path) -> str:
    """The name of the split that chose the member's prompt; UserError where rows were held out."""
    settings = json.loads((member / "result.json").read_text(encoding="utf-8"))["settings"]
    if settings.get("select_split") is None:
        raise UserError(f"{member} chose its prompt on rows held out of training; a --select_split is needed.")
    return str(settings["select_split"])


def scores_of(served: Served, backbone: Backbone, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(scores [N, C], right answers [N]) under the served prompt, of the rows whose right answer is known."""
    examples = [example for example in examples if example.trainable]
    asked = [Questions(served.trained(backbone)[0], examples, served.rows)]
    return score_prompts(backbone, asked, alone(), 16384)[0], torch.tensor([example.gold for example in examples])


def outcome_of(served: Served, backbone: Backbone, member: Path) -> Outcome:
    """Its temperature from the selection rows, its cross-entropies on the reported ones."""
    (select_NC, select_N), (eval_NC, eval_N) = (
        scores_of(
            served, backbone, served.examples(adapter_rows(member / "adapter", served.task, split), labelled=True)
        )
        for split in (selection_split(member), None)
    )
    temperature = fitted(select_NC, select_N)
    return Outcome(nats(eval_NC, eval_N), nats(eval_NC, eval_N, temperature), temperature)


def shown(values: Sequence[float]) -> str:
    """Mean, standard deviation, highest."""
    found = spread_of(values)
    return " | ".join(map(shown_score, (found.mean, found.std, found.largest)))


def main(argv: list[str]) -> None:
    """Prints a table, a line a cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", type=Path, help="folders of a study's cells, cells/TASK/METHOD")
    args = parser.parse_args(argv)
    prepare_environment()
    members = {cell: members_of(cell) for cell in args.cells}
    served = {member: serve([str(member)]) for some in members.values() for member in some}
    first = next(iter(served.values()))
    for member, one in served.items():
        selection_split(member)
        if one.source.folder != first.source.folder:
            raise UserError(
                f"{member} is of {one.source.folder}, the first of {first.source.folder}; give one model's."
            )
    backbone = first.load(whole(), alone())
    columns = ("cell", "cross-entropy", "standard deviation", "highest", "with a temperature", "standard deviation",
               "highest", "median temperature")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|---|---|"]
    with said_once("ptp_ds.adapters.origin"):  # where the rows are
        for cell, some in members.items():
            found = [outcome_of(served[member], backbone, member) for member in some]
            before, behind = shown([one.before for one in found]), shown([one.behind for one in found])
            warm = median(one.temperature for one in found)
            lines.append(f"| {'/'.join(cell.resolve().parts[-2:])} | {before} | {behind} | {warm:.2f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
