#!/usr/bin/env python
"""A line of reference beside a study's prompts: LoRA by peft, on the same rows, templates, seeds and batches.

    python scripts/bench/lora_line.py docs/few_shot/study.yaml --tasks SST2 --out runs/lora.jsonl

Of the study's baseline it takes each seed's training, selection and reported rows, its steps, batches, warm-up and
schedule; learning rate, rank and layers are LoRA's own. The objective and the scores are a prompt's: the softmax over
the task's answers. The adapter of the last step is scored. --out gets a line a run; runs that it holds are not run
again, where settings, rows, template and model are the same: `run` in its line is a hash of these, `study` one of those
of all the task's seeds. A table over seeds, a line for each study, is printed at the end. For causal models.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft_loop import PaddedScores
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptp_ds.commands.exits import run_command
from ptp_ds.commands.members import prepare_population
from ptp_ds.errors import UserError
from ptp_ds.models.heads import Head
from ptp_ds.objective import cross_entropy_sum
from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.seeding import derive_seed
from ptp_ds.studies.statistics import spread_of
from ptp_ds.studies.study import read_study
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import Evaluation, evaluation_of
from ptp_ds.training.examples import batch_order
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.schedules import learning_rate

_ROWS = 16  # of a pass that scores


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a study file (docs/studies.md)")
    parser.add_argument("--tasks", nargs="*", help="those of the study that are run; all without it")
    parser.add_argument("--seeds", nargs="*", type=int, help="those of the study that are run; all without it")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate, which falls as the study says")
    parser.add_argument("--rank", type=int, default=8, help="of the update of each weight; alpha is twice as much")
    parser.add_argument("--layers", nargs="+", default=["q_proj", "v_proj"], help="names of the layers that get one")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run")
    return parser.parse_args(argv)


class LoraRun:
    """One seed's adapter."""

    def __init__(self, prepared: Prepared, args: argparse.Namespace) -> None:
        from peft import LoraConfig, get_peft_model

        if prepared.source.head_plan.kind != "causal":
            raise UserError("lora_line.py is for causal models; the study names another.")
        self.run, self.examples, self.task = prepared.run, prepared.examples, prepared.task
        self.order = batch_order(self.run, prepared.rows, self.examples.train)
        base = AutoModelForCausalLM.from_pretrained(
            prepared.source.folder, dtype=prepared.resolved.dtype, use_safetensors=True
        )
        config = LoraConfig(
            task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0,
            target_modules=list(args.layers), init_lora_weights=True,
        )  # fmt: skip
        torch.manual_seed(derive_seed(self.run.seed, "lora"))  # peft draws from torch's
        self.model = get_peft_model(base.eval(), config)
        self.embed = base.get_input_embeddings()
        self.padded = PaddedScores(self.model, Head("causal"), torch.device("cpu"), keep=True)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.lr, weight_decay=0.0)
        self.rate = replace(self.run, lr=args.lr)

    def scores(self, examples: list[Example]) -> Tensor:
        """[B, C] of a task whose rows have equally many answers."""
        batch = self.padded.pad(examples)
        with torch.no_grad():
            embeds = self.embed(batch["ids"])
        positions = (batch["mask"].cumsum(-1) - 1).clamp_min(0)  # rows are padded on the left
        return self.padded.scores(embeds, batch["mask"], position_ids=positions)

    def train(self) -> float:
        """All steps; the loss of the last one, a mean over its rows."""
        loss = torch.zeros(())
        for step in range(self.run.max_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.rate, step)
            rows = [self.examples.train[number] for number in self.order.batch(step)]
            scores = self.scores(rows)
            loss = cross_entropy_sum(scores, self.padded.gold) / len(rows)
            self.optimizer.zero_grad()
            self._require_finite(loss, f"loss is not finite at step {step + 1}")
            loss.backward()
            if self.run.max_grad_norm:  # 0 turns clipping off
                torch.nn.utils.clip_grad_norm_(self.trained, self.run.max_grad_norm)
            self.optimizer.step()
        return float(loss.detach())

    def _require_finite(self, values: Tensor, what: str) -> None:
        if not bool(values.detach().isfinite().all()):
            raise UserError(f"LoRA on {self.task.name}, seed {self.run.seed}: the {what}; lower --lr.")

    @torch.no_grad()
    def evaluate(self, examples: Any) -> Evaluation:
        """Metrics of rows, scored in passes of rows of about one length."""
        order = sorted(range(len(examples)), key=lambda number: examples[number].path_length)
        found = torch.zeros(len(examples), len(examples[0].candidate_ids))
        for first in range(0, len(order), _ROWS):
            numbers = order[first : first + _ROWS]
            found[numbers] = self.scores([examples[number] for number in numbers]).float()
        self._require_finite(found, f"scores of the adapter of step {self.run.max_steps} are not finite")
        return evaluation_of(found, examples, self.task)


def one_run(prepared: Prepared, key: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores one seed; a line of --out, which begins with what it is known by."""
    lora = LoraRun(prepared, args)
    loss = lora.train()
    select, reported = lora.evaluate(lora.examples.select), lora.evaluate(lora.examples.evaluation)
    return {**key, "trained": sum(parameter.numel() for parameter in lora.trained), "loss": loss,
            "select": select.score, "select_cross_entropy": select.cross_entropy, "score": reported.score,
            "metrics": reported.metrics}  # fmt: skip


def keys_of(task: str, members: Mapping[str, Prepared], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each seed's line is known by. run: a hash of all that it has beside its seed; study: of its task's runs."""
    runs = {name: _short({**one.identity, "seed": None, "rows": one.digests}) for name, one in members.items()}
    study = _short(list(dict.fromkeys(runs.values())))  # more seeds on the same draws are the same study
    asked = {"lr": args.lr, "rank": args.rank, "layers": list(args.layers)}
    return {
        name: {"task": task, "seed": one.run.seed, **asked, "study": study, "run": runs[name]}
        for name, one in members.items()
    }


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def main(argv: list[str]) -> int | None:
    """Runs what --out lacks, and prints the table of all that it holds."""
    args = parse_arguments(argv)
    study = read_study(args.study)
    cells = study.part([study.baseline], args.tasks).cells
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for cell in cells:
        members = prepare_population(cell.run, cell.explicit, cell.members)
        for name, key in keys_of(cell.task, members, args).items():
            is_done = any(all(row.get(part) == value for part, value in key.items()) for row in found)
            if (args.seeds and key["seed"] not in args.seeds) or is_done:
                continue
            found.append(one_run(members[name], key, args))
            with args.out.open("a") as file:
                print(json.dumps(found[-1]), file=file)
            print(f"{cell.task} seed {key['seed']}: score {found[-1]['score']:.3f}", flush=True)
    print(*table(found), sep="\n")
    return None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each study, task and setting: over seeds, of the selection rows and of the reported ones."""
    groups = defaultdict(list)
    for row in rows:  # lines of older versions don't say of which study they are
        groups[row.get("study", "-"), row["task"], row["lr"], row["rank"], " ".join(row["layers"])].append(row)
    lines = ["| study | task | lr | rank | layers | seeds | selection rows | mean | standard deviation | worst seed |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for key, own in groups.items():
        spread = spread_of([row["score"] for row in own])
        select = sum(row["select"] for row in own) / len(own)
        std = "" if spread.std is None else f"{spread.std:.3f}"  # of one seed there is none
        lines.append(
            f"| {' | '.join(map(str, key))} | {spread.count} | {select:.3f} | {spread.mean:.3f} | {std} | "
            f"{spread.least:.3f} |"
        )
    return lines


if __name__ == "__main__":
    prepare_environment()
    sys.exit(run_command(lambda: main(sys.argv[1:])))
