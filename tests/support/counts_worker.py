"""Run by tests/training/test_counts.py: train steps on a device that isn't there, and what they ask of it.

Prints a JSON line a case: waits and blocking copies by what and where, copies sent, operators in the step's parts, and
how far loss and gradient are from the host's own.
"""

import json
import os
import sys
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptp_ds.attention import flash
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.member_adamw import MemberAdamW, MemberRate
from ptp_ds.training.population_step import MemberStep, population_loss, population_row
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.chip import Counts, install
from tests.support.deep_prompts import deep_prompt
from tests.support.encoders import make_backbone, make_values
from tests.support.packed import make_prompt
from tests.support.reference import FAMILIES, REFUSED, make_examples, make_model, with_instruction
from tests.support.seq2seq import make_seq2seq

CHIP = install()


def make_case(case):
    """(backbone, what is trained) on the host, a case's, always the same."""
    family, prompt, mode = case["family"], case.get("prompt", "soft"), case.get("mode", "keep")
    if "head" in case:
        backbone = make_backbone(family, case["head"], prompt)
        return backbone, make_values(backbone)
    if family == "bart":
        backbone = PaddedBackbone(Backbone(make_seq2seq(family), head=Head("seq2seq")))
        backbone.serve("soft", SeparateRows(kind="seq2seq", prompt_length=5, tail=(1,)))
    elif family in REFUSED:
        backbone = PaddedBackbone(Backbone(make_model(family)))
        backbone.serve("soft", TreeRows(), 5)
    else:
        model = make_model(family, getattr(torch, case.get("dtype", "float32")))
        if "layers" in case:
            config = AutoConfig.for_model(family, **{**FAMILIES[family], "num_hidden_layers": case["layers"]})
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        backbone = Backbone(model, Activations(mode), prompt)
        backbone.narrows = case.get("narrows", False)
    return backbone, make_prompt() if prompt == "soft" else deep_prompt(backbone.model)


def row_of(backbone, run, settings, noise, shape):
    examples = with_instruction(make_examples(shape))
    shared, how = backbone.rows.shared_start(examples), run.active_perturbation
    if how is None or how.twins is None:
        return backbone.rows.pack(examples, shared)
    twins = how.twins(examples, settings, noise)
    movable = [twin.movable for twin in twins] if how.find is not None else None
    return backbone.rows.pack_twins(examples, [twin.context_ids for twin in twins], movable, shared)


def step(case, device):
    """(counts, kernels of the forward, loss, gradient) of one step's forward and backward on a device."""
    backbone, values = make_case(case)
    backbone.model.to(device)
    trained = values.to(device).requires_grad_()
    run = RunConfig(perturbation=case["perturbation"], divergence=case.get("divergence", "sym_kl"), reg_weight=0.7,
                    epsilon=0.5, sigma=0.5, min_confidence=case.get("min_confidence", 0.0))  # fmt: skip
    settings, noise = settings_of(run, 1.0), Noise(3, 4)
    row = row_of(backbone, run, settings, noise, case["shape"])
    with Counts() as counts:
        if case.get("population"):
            total = population_total(backbone, row, run, settings, trained, device)
        else:
            plan = backbone.plan(row, backbone.prefix_lengths(row, 5), case.get("max_rows"), device).to(device)
            options = PassOptions(case.get("max_rows"), plan=plan)
            total = ptp_loss(trained, backbone, row.to(device), run, settings, noise, options).total
        forward = counts.kernels
        total.backward()
    return counts, forward, host(total), host(trained.grad)


def population_total(backbone, row, run, settings, trained, device):
    members = [MemberStep(replace(run, seed=n), settings, Noise(n, 4), row) for n in range(2)]
    population = population_row(members, [5, 5]).to(device)
    return torch.stack(
        [loss.total for loss in population_loss(torch.cat([trained, trained]), backbone, population)]
    ).sum()


def host(x):
    return getattr(x, "host", x).detach()


def count(case):
    for dtype in (torch.bfloat16, torch.float32):  # fp32 as in half precision on a GPU, but numbers can be told in it
        flash._proven[CHIP, dtype] = True
    counts, forward, loss, gradient = step(case, CHIP)
    *_, known, right = step(case, torch.device("cpu"))
    return {
        "waits": dict(counts.waits), "copies": dict(counts.copies), "sent": counts.sent,
        "forward": forward, "backward": counts.kernels - forward,
        "loss_error": float((loss - known).abs() / known.abs()),
        "error": float((gradient - right).norm() / right.norm()),
    }  # fmt: skip


def update():
    """What MemberAdamW's steps ask for, after the first."""
    weight = torch.nn.Parameter(torch.ones(12, device=CHIP))
    optimizer = MemberAdamW([weight], [4, 8], Ranks(0, 1, 0, CHIP))
    optimizer.rates = [MemberRate(0.1, 0.01, 1.0), MemberRate(0.2)]
    for _ in range(2):
        weight.grad = torch.ones(12, device=CHIP)
        with Counts() as counts:
            optimizer.step()
    return {"waits": dict(counts.waits), "copies": dict(counts.copies), "sent": counts.sent}


def instrument():
    """What each of these counts as: one wait, one copy, or nothing."""
    x, numbers, places = torch.ones(4, device=CHIP), torch.tensor([3, 1, 2]), torch.tensor([0, 1])
    tries = {
        "item": lambda: x.sum().item(), "bool": lambda: bool(x.all()), "nonzero": lambda: x.nonzero(),
        "boolean index": lambda: x[x > 0], "masked_select": lambda: x.masked_select(x > 0),
        "unique": lambda: torch.unique(x), "equal": lambda: torch.equal(x, x),
        "repeat_interleave": lambda: x.long().repeat_interleave(x.long()),
        "where": lambda: torch.where(x > 0), "cpu": lambda: x.cpu(), "tolist": lambda: x.tolist(),
        "tensor": lambda: torch.tensor([1, 2], device=CHIP), "to": lambda: numbers.to(CHIP),
        "not pinned": lambda: numbers.to(CHIP, non_blocking=True), "copy_": lambda: x.copy_(torch.ones(4)),
        "an index of the host's": lambda: x[places],
        "pinned": lambda: torch.empty(3, pin_memory=True).to(CHIP, non_blocking=True),
        "pinned and waited for": lambda: torch.empty(3, pin_memory=True).to(CHIP),
        "arithmetic": lambda: (x * 2 + 1).clamp_min(0).index_select(0, torch.arange(2, device=CHIP)),
        "a number for where": lambda: torch.where(x > 0, x, 0.0),
    }  # fmt: skip
    found = {}
    for name, attempt in tries.items():
        with Counts() as counts:
            attempt()
        found[name] = [sum(counts.waits.values()), sum(counts.copies.values()), counts.sent]
    return found


if __name__ == "__main__":
    print(json.dumps(instrument()))
    print(json.dumps(update()))
    for case in json.loads(sys.argv[1]):
        print(json.dumps(count(case)), flush=True)
    os._exit(0)  # autograd's thread for the chip outlives an ordinary end
