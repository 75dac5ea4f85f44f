"""Run by tests/test_precision.py: fp16 with a loss scale, 0 for a dynamic one, on a CPU where DeepSpeed is told that it
may.

Prints one JSON line: losses of fp32 and of fp16, which fp16 steps moved the prompt, and whether a resumed engine goes
on bit for bit.
"""

import json
import sys

import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks, exit_process, start_processes, stop_processes
from ptp_ds.training.engine import Engine
from ptp_ds.training.step import optimizer_step, settings_of
from tests.support.reference import make_examples, make_model

STEPS = 16


def make_engine(stage: int, half: bool, ranks: Ranks, scale: float = 0) -> Engine:
    config = {
        "train_batch_size": 3, "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0,
        "fp16": {"enabled": half, "loss_scale": scale}, "steps_per_print": 1 << 30,
    }  # fmt: skip
    dtype = torch.float16 if half else torch.float32
    start = 0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    engine = Engine(
        SoftPrompt(start), Backbone(make_model("llama", dtype)), ResolvedDeepSpeed(config, [], dtype), ranks
    )
    engine.set_prompt(start)
    return engine


def train(engine: Engine, run: RunConfig, first: int, last: int) -> tuple[list[float], list[bool], torch.Tensor]:
    row, losses, moved, delta = pack(make_examples("single")), [], [], None
    for step in range(first, last):
        before = engine.prompt()
        noise = Noise(0, step)
        loss, delta = optimizer_step(
            engine, row, run, settings_of(run, 1.0), noise, 0.01, global_count=3, carried_TH=delta
        )
        if step % run.batch_repeats:
            delta = None
        losses.append(loss.total.item())
        moved.append(not torch.equal(engine.prompt(), before))
        assert moved[-1] is not engine.skipped()
        assert not engine.broken(), "a scale that was too large is none of the prompt's"
    return losses, moved, engine.prompt()


def main(stage: int, perturbation: str, scale: float) -> None:
    ranks = start_processes()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    run = RunConfig(perturbation=perturbation, epsilon=0.05, batch_size=3, prompt_length=5)
    wide, _, _ = train(make_engine(stage, False, ranks), run, 0, STEPS)
    engine = make_engine(stage, True, ranks, scale)
    narrow, moved, _ = train(engine, run, 0, STEPS)
    state = engine.state()
    _, _, on = train(engine, run, STEPS, STEPS + 4)
    resumed = make_engine(stage, True, ranks, scale)
    resumed.load_state(state)
    _, _, again = train(resumed, run, STEPS, STEPS + 4)
    report = {"fp32": wide, "fp16": narrow, "moved": moved, "resumed": torch.equal(on, again),
              "scale": engine.loss_scale(), "resumed_scale": resumed.loss_scale()}  # fmt: skip
    print(json.dumps(report), flush=True)
    stop_processes()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
    exit_process(0)  # see there: a rank now and then aborts in the interpreter's own teardown
