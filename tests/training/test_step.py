"""The step in fp16: ascents don't overflow where training doesn't."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.training.step import _ascent_scale, ptp_loss, settings_of, step_in_parts
from tests.support.packed import make_prompt
from tests.support.reference import make_examples, make_model, plain_scores

EXAMPLES = make_examples("multi")


def gold_of(example):
    """The answer that the model gives before it is trained."""
    return int(plain_scores(make_model("llama"), make_prompt(), example).argmax())


class Fp16Engine:
    """Engine's mathematics alone, on one rank, at a fixed loss scale."""

    def __init__(self, scale: float) -> None:
        self.backbone, self.ranks = Backbone(make_model("llama", torch.float16)), SimpleNamespace(world=1)
        self.prompt, self.loss_scale = make_prompt(torch.float16).requires_grad_(), lambda: scale

    def trained(self) -> torch.Tensor:
        return self.prompt * 1

    def backward_sum(self, total: torch.Tensor, global_count: int) -> None:
        (total * (self.loss_scale() / global_count)).backward()

    def step(self, lr: float) -> None:
        """None is taken."""


def test_a_row_climbs_among_many_that_are_right(monkeypatch):
    """One row whose divergence has a gradient, 255 that are sure and stay: the mean has a small one, and the loss
    scale so high as it is finite with."""
    confidence = [float(plain_scores(make_model("llama"), make_prompt(), e).softmax(-1).max()) for e in EXAMPLES]
    assert confidence[0] < 0.9 < 0.9999 < confidence[2]
    sure = replace(EXAMPLES[2], movable=[False] * len(EXAMPLES[2].context_ids), gold=gold_of(EXAMPLES[2]))
    row = pack([replace(EXAMPLES[0], gold=gold_of(EXAMPLES[0])), *(replace(sure, index=n) for n in range(1, 256))])
    run, engine, noise = RunConfig(perturbation="pgd", epsilon=1.0, ascent_steps=1), Fp16Engine(2.0**22), Noise(0, 1)
    settings, deltas = settings_of(run, 1.0), []

    def kept(*arguments):
        deltas.append(ptp_loss(*arguments))
        return deltas[-1]

    monkeypatch.setattr("ptp_ds.training.step.ptp_loss", kept)
    step_in_parts(engine, [row], [None], run, settings, noise, 0.1, global_count=256)
    assert bool(engine.prompt.grad.isfinite().all())
    assert float(engine.prompt.grad.float().norm()) > 1e4
    moved = deltas[0].delta - start_delta(row, 32, settings, noise)
    assert float(moved[: row.lengths[0]].norm()) > 0.1


@pytest.mark.parametrize(
    ("world", "count", "parts", "scale", "wanted"),
    [(1, 8, 1, 2**16, 512), (2, 256, 1, 2**16, 32), (2, 256, 4, 2**16, 4096), (1, 64, 1, 128, 1), (1, 64, 1, 1, 1)],
)
def test_a_sixteenth_of_what_a_rows_loss_is_multiplied_by(world, count, parts, scale, wanted):
    """Of several parts each goes backward by itself, before the sum is divided."""
    engine = SimpleNamespace(loss_scale=lambda: float(scale), ranks=SimpleNamespace(world=world))
    assert _ascent_scale(engine, count, parts) == wanted
