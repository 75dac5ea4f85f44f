"""The train step: what is computed for one packed row, in the order of the formula in ptp_ds.objective."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptp_ds.backbone import Backbone
from ptp_ds.config import RunConfig
from ptp_ds.objective import cross_entropy_sum, divergence_sum
from ptp_ds.packing import PackedRow
from ptp_ds.perturb import PERTURBATIONS, Ascent, Noise, PerturbSettings
from ptp_ds.perturb.ball import example_norm
from ptp_ds.prompts import SoftPrompt


class PromptedBackbone(nn.Module):
    """What the DeepSpeed engine wraps: the trained prompt in front of the frozen backbone."""

    def __init__(self, prompt: SoftPrompt, backbone: Backbone) -> None:
        super().__init__()
        self.prompt = prompt
        self.backbone = backbone

    def forward(self, row: PackedRow, embeds_TH: Tensor) -> Tensor:
        """[S, B, C] candidate log-probabilities, prompt and all streams in one pass."""
        return self.backbone.score(row, embeds_TH, self.prompt())


@dataclass(frozen=True)
class StepLoss:
    """Sums over the row's examples, on the device. total carries the gradient; the rest is for the log."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    delta_norm: Tensor
    tokens: int


def settings_of(run: RunConfig, unit: float) -> PerturbSettings:
    """The perturbation's settings; unit: the backbone's mean embedding norm."""
    return PerturbSettings(
        unit=unit, sigma=run.sigma, epsilon=run.epsilon, alpha=run.step_length, steps=run.ascent_steps, norm=run.norm,
        divergence=run.divergence,
    )  # fmt: skip


def reg_weight_at(run: RunConfig, step: int) -> float:
    """lambda in optimizer step `step` (0-based): rises linearly over reg_warmup_steps."""
    return run.reg_weight * min(1.0, (step + 1) / (run.reg_warmup_steps + 1))


def ptp_loss(
    forward: Callable[[PackedRow, Tensor], Tensor], model: PromptedBackbone, row: PackedRow, run: RunConfig,
    settings: PerturbSettings, noise: Noise,
) -> StepLoss:  # fmt: skip
    """The summed loss of one packed row. forward: the engine (or the model itself, outside training).

    Without a perturbation the pass is plain prompt tuning, the very same operations.
    """
    clean_TH = model.backbone.embed(row.token_ids)
    tokens = model.prompt.length + row.num_tokens
    if not run.perturbs:
        scores = forward(row, clean_TH)[0]
        loss = cross_entropy_sum(scores, row.gold)
        zero = torch.zeros((), device=loss.device)
        return StepLoss(loss, loss.detach(), zero, zero, tokens)

    def ascent() -> Ascent:
        with torch.no_grad():
            prompt = model.prompt()
        return Ascent(model.backbone, prompt, row, clean_TH)

    delta_TH = PERTURBATIONS[run.perturbation](ascent, row, clean_TH, settings, noise)
    both_TH = torch.cat([clean_TH, clean_TH + delta_TH.to(clean_TH.dtype)])
    clean_BC, perturbed_BC = forward(row.with_twin(row), both_TH)
    cross_entropy = cross_entropy_sum(clean_BC, row.gold)
    divergence = divergence_sum(run.divergence, clean_BC, perturbed_BC, row.gold)
    total = cross_entropy + reg_weight_at(run, noise.step) * divergence
    delta_norm = example_norm(delta_TH, row).sum()
    return StepLoss(total, cross_entropy.detach(), divergence.detach(), delta_norm, tokens + row.num_tokens)
