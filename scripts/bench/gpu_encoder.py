#!/usr/bin/env python
"""An encoder of BERT base's shape with a masked head: a step in bf16 against the same weights in fp32.

Weights and prompt are random, the same in both. score_difference, gradient_difference: relative l2 distance of bf16's
scores and prompt gradient from fp32's.
"""

import copy
import statistics
from typing import Any

import torch
from bench_measure import peak_of
from bench_random import Opened, timed_steps
from gpu_record import Record, part_parser
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.commands.exits import run_command
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks, exit_process, prepare_environment, start_processes
from ptp_ds.training.engine import Engine

_BOUND = 0.1  # of scores and gradients: what twelve layers of bf16 may round
_MASK = 103


def open_encoder(model: BertForMaskedLM, precision: str, prompt: Tensor, ranks: Ranks) -> Opened:
    """The model as training opens it, in one precision."""
    run = RunConfig(ds_config="ds_configs/zero2.json", precision=precision, perturbation="gaussian",
                    prompt_length=prompt.shape[0])  # fmt: skip
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), ranks.world, model.config.hidden_size)
    backbone = Backbone(copy.deepcopy(model).to(ranks.device, resolved.dtype), head=Head("masked"))
    check_backbone(backbone)
    backbone.serve("soft", SeparateRows(kind="masked", prompt_length=run.prompt_length, mask_id=_MASK, tail=(102,)),
                   run.prompt_length)  # fmt: skip
    engine = Engine(SoftPrompt(prompt.clone()), backbone, resolved, ranks)
    engine.set_prompt(prompt)
    return Opened(model.config, run, resolved, ranks, engine, prompt, backbone.mean_embedding_norm())


def measure(opened: Opened, rows: int, steps: int) -> dict[str, Any]:
    """Seconds and memory of a gaussian step on fresh rows."""
    device, packed = opened.ranks.device, opened.rows(rows, steps + 1)
    with peak_of(opened.backbone, device) as peak:
        opened.step(packed[0], 0)
    seconds, values = timed_steps(lambda number: opened.step(packed[number], number), device, steps, warm=True)
    median = statistics.median(seconds)
    return {"step_seconds": median, "tokens_per_second": values[0][1] / median, "peak_bytes": peak.allocated,
            "reserved_bytes": peak.reserved}  # fmt: skip


def scored(opened: Opened, rows: int) -> tuple[Tensor, Tensor]:
    """Scores of the clean stream, and the prompt's gradient of their sum of squares, both in fp32 on the CPU."""
    backbone, row = opened.backbone, opened.rows(rows, 1)[0].to(opened.ranks.device)
    trained = opened.start.to(opened.ranks.device, backbone.dtype).requires_grad_()
    scores = backbone.score(row, backbone.inputs(row, trained), trained)[0].float()
    (gradient,) = torch.autograd.grad((scores - scores.detach().mean(-1, keepdim=True)).square().sum(), trained)
    return scores.detach().cpu(), gradient.float().cpu()


def main() -> int:
    prepare_environment()
    args = part_parser(__doc__).parse_args()
    ranks, record = start_processes(), Record(args.json)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 512} if args.dry else {}  # fmt: skip
    rows, steps = (4, 1) if args.dry else (64, 5)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**size)).eval()
    prompt = 0.1 * torch.randn(20, model.config.hidden_size)
    found: dict[str, dict[str, Any]] = {}
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for precision in ("fp32", "bf16"):
        with record.case(precision):
            opened = open_encoder(model, precision, prompt, ranks)
            values[precision], found[precision] = scored(opened, rows), measure(opened, rows, steps)
            record.add(precision, **found[precision])
    if len(found) == 2:
        with record.case("bf16 against fp32"):
            apart = [float((a - b).norm() / b.norm()) for a, b in zip(values["bf16"], values["fp32"], strict=True)]
            speedup = found["fp32"]["step_seconds"] / found["bf16"]["step_seconds"]
            record.add("bf16 against fp32", score_difference=apart[0], gradient_difference=apart[1], speedup=speedup)
            if not max(apart) <= _BOUND:
                raise ValueError(f"bf16 differs from fp32 by {max(apart):.1e}")
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
