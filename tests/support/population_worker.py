"""Run by tests/training/test_population_engine.py under torchrun: members trained together and alone; a JSON report."""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks, exit_process, start_processes, stop_processes
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example
from ptp_ds.training.engine import Engine
from ptp_ds.training.member_adamw import MemberRate
from ptp_ds.training.population_engine import PopulationEngine
from ptp_ds.training.population_step import MemberStep, population_loss, population_row
from ptp_ds.training.schedules import learning_rate
from ptp_ds.training.step import optimizer_step, settings_of

WIDTH, STEPS, BATCH = 64, 20, 4
ROWS = (7, 3, 5)  # of each member's prompt
BROKEN = 1  # the member that is made to fail
POISONED = 3  # the step at which its gradient is not finite, on the last rank


def runs_of(perturbation: str, stage: str) -> list[RunConfig]:
    """The members' settings: all that may differ does."""
    return [
        RunConfig(
            ds_config=stage, perturbation=perturbation, seed=seed, lr=0.01 * (seed + 1), weight_decay=0.1 * seed,
            max_grad_norm=(0.05, 0.0, 1.0)[seed], warmup_steps=2 + seed, max_steps=STEPS + 10 * seed, batch_size=BATCH,
            lr_schedule=("linear", "cosine", "constant")[seed], sigma=0.3 + 0.2 * seed, epsilon=0.1 + 0.1 * seed,
            reg_weight=1.0 + seed, divergence=("kl", "js", "sym_kl")[seed],
        )
        for seed in range(len(ROWS))
    ]  # fmt: skip


def batch_of(seed: int, step: int) -> list[Example]:
    """A member's global batch, rows of uneven length."""
    generator = make_generator(seed, "batch", step)
    sizes = torch.randint(3, 18, (BATCH,), generator=generator).tolist()
    return [
        Example(context_ids=torch.randint(0, 128, (size,), generator=generator).tolist(), movable=[True] * size,
                candidate_ids=[[1, 2], [3]], gold=number % 2, index=100 * step + number)
        for number, size in enumerate(sizes)
    ]  # fmt: skip


def start_of(seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(ROWS[seed], WIDTH, generator=make_generator(seed, "start"))


def train_alone(backbone: Backbone, resolved, ranks: Ranks, run: RunConfig, unit: float) -> dict:
    """One member by Engine and optimizer_step."""
    engine = Engine(SoftPrompt(torch.zeros(ROWS[run.seed], WIDTH)), backbone, resolved, ranks, run.weight_decay)
    engine.set_prompt(start_of(run.seed))
    norms, losses = [], []
    backbone.shards.traffic.reset()
    for step in range(STEPS):
        row = pack(batch_of(run.seed, step)[ranks.rank :: ranks.world])
        loss, _ = optimizer_step(
            engine, row, run, settings_of(run, unit), Noise(run.seed, step), learning_rate(run, step),
            global_count=BATCH,
        )  # fmt: skip
        norms.append(engine.grad_norm())
        losses.append(float(ranks.sum(loss.total.detach())) / BATCH)
    gathers = backbone.shards.traffic.gathers
    return {"prompt": engine.prompt(), "norms": norms, "losses": losses, "gathers": gathers, "state": engine.state()}


def train_together(
    backbone: Backbone, resolved, ranks: Ranks, runs: list[RunConfig], unit: float, broken: bool = False,
    poisoned: bool = False,
) -> dict:  # fmt: skip
    """All members by PopulationEngine; broken: one's prompt begins with infinities. poisoned: its gradient, not its
    loss, is not finite in one step, on one rank; `held` is whether it then is what it was before."""
    engine = PopulationEngine(SoftPrompt(torch.zeros(sum(ROWS), WIDTH)), backbone, resolved, ranks, ROWS)
    starts = [start_of(run.seed) for run in runs]
    if broken:
        starts[BROKEN] = starts[BROKEN] + float("inf")
    engine.set_prompt(torch.cat(starts))
    norms, losses, held = [], [], True
    backbone.shards.traffic.reset()
    for step in range(STEPS):
        members = [
            MemberStep(run, settings_of(run, unit), Noise(run.seed, step),
                       pack(batch_of(run.seed, step)[ranks.rank :: ranks.world])) for run in runs
        ]  # fmt: skip
        with backbone.shards.outside_layers():
            found = population_loss(trained := engine.trained(), backbone, population_row(members, ROWS))
            totals = [loss.total for loss in found]
            if poisoned and step == POISONED and ranks.rank == ranks.world - 1:
                totals[BROKEN] = totals[BROKEN] + (trained.split(ROWS)[BROKEN].sum() * 0.0).sqrt()
            engine.backward_sums(totals, [BATCH] * len(runs))
        before = engine.state()
        rates = [MemberRate(learning_rate(run, step), run.weight_decay, run.max_grad_norm) for run in runs]
        engine.step_members(rates)
        if poisoned and step == POISONED:
            after = engine.state()
            held = all(torch.equal(*(state[name].split(ROWS)[BROKEN] for state in (before, after)))
                       for name in ("prompt", "exp_avg", "exp_avg_sq"))  # fmt: skip
        norms.append(engine.grad_norms().tolist())
        losses.append((ranks.sum(torch.stack([loss.total.detach() for loss in found])) / BATCH).tolist())
    gathers = backbone.shards.traffic.gathers
    return {
        "prompts": engine.prompt().split(ROWS), "norms": norms, "losses": losses, "gathers": gathers,
        "state": engine.state(), "held": held,
    }  # fmt: skip


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def main(perturbation: str, stage: str, folder: Path) -> None:
    ranks = start_processes()
    runs = runs_of(perturbation, stage)
    settings = RunConfig(ds_config=stage, batch_size=BATCH, precision="fp32", max_grad_norm=1.0)
    resolved = resolve_ds_config(read_ds_config(stage), settings, set(), ranks.world, WIDTH)
    config = LlamaConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    model = build_sharded(config, resolved)
    torch.manual_seed(ranks.rank)
    fill_randomly(model)
    backbone = Backbone(model)
    check_backbone(backbone)
    unit = backbone.mean_embedding_norm()
    together = train_together(backbone, resolved, ranks, runs, unit)
    broken = train_together(backbone, resolved, ranks, runs, unit, broken=True)
    poisoned = train_together(backbone, resolved, ranks, runs, unit, poisoned=True)
    finite = [[math.isfinite(norm) for norm in step] for step in poisoned["norms"]]
    report: dict = {
        "together_gathers": together["gathers"], "members": [], "held": poisoned["held"], "poisoned": finite,
        "sound": [math.isfinite(loss) for loss in poisoned["losses"][POISONED]],
    }  # fmt: skip
    for number, run in enumerate(runs):
        member_run = RunConfig(**{**vars(settings), "max_grad_norm": run.max_grad_norm, "seed": run.seed})
        own = resolve_ds_config(read_ds_config(stage), member_run, set(), ranks.world, WIDTH)
        alone = train_alone(backbone, own, ranks, run, unit)
        report["members"].append(
            {
                "prompt": distance(together["prompts"][number], alone["prompt"]),
                "moved": distance(alone["prompt"], start_of(run.seed)),
                "beside a broken one": distance(broken["prompts"][number], alone["prompt"]),
                "beside a poisoned one": distance(poisoned["prompts"][number], alone["prompt"]),
                "moments": [
                    distance(together["state"][name].split(ROWS)[number], alone["state"][name])
                    for name in ("exp_avg", "exp_avg_sq")
                ],
                "norms": [[step[number] for step in together["norms"]], alone["norms"]],
                "losses": [[step[number] for step in together["losses"]], alone["losses"]],
                "gathers": alone["gathers"],
            }
        )
    (folder / f"report-{ranks.rank}.json").write_text(json.dumps(report))
    stop_processes()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    exit_process(0)  # see there: a rank now and then aborts in the interpreter's own teardown
