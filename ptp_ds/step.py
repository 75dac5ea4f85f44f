"""The train step: what is computed for one packed row, in the order of the formula in ptp_ds.objective."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptp_ds.backbone import Backbone, TrunkCache
from ptp_ds.config import RunConfig
from ptp_ds.objective import cross_entropy_sum, divergence_sum
from ptp_ds.packing import PackedRow
from ptp_ds.perturb import PERTURBATIONS, CleanPass, Noise, PerturbSettings
from ptp_ds.perturb.ball import example_norm
from ptp_ds.prompts import SoftPrompt


class PromptedBackbone(nn.Module):
    """What the DeepSpeed engine wraps: the trained prompt in front of the frozen backbone."""

    def __init__(self, prompt: SoftPrompt, backbone: Backbone) -> None:
        super().__init__()
        self.prompt = prompt
        self.backbone = backbone

    def forward(self, row: PackedRow, embeds_TH: Tensor, record: TrunkCache | None = None) -> Tensor:
        """[S, B, C] candidate log-probabilities, prompt and all streams in one pass; `record`: see Backbone.score."""
        return self.backbone.score(row, embeds_TH, self.prompt(), record=record)


@dataclass(frozen=True)
class StepLoss:
    """Sums over the row's examples, on the device. objective carries total's gradient; the rest is for the log."""

    objective: Tensor
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
    forward: Callable[..., Tensor], model: PromptedBackbone, row: PackedRow, run: RunConfig, settings: PerturbSettings,
    noise: Noise,
) -> StepLoss:  # fmt: skip
    """The summed loss of one packed row. forward: the engine's (or the model itself, outside training).

    Without a perturbation the pass is plain prompt tuning, the very same operations. Noise is known beforehand, so both
    streams run as one pass; an adversarial delta climbs from the clean pass, which is then not computed again.
    """
    clean_TH = model.backbone.embed(row.token_ids)
    tokens = model.prompt.length + row.num_tokens
    if not run.perturbs:
        total = cross_entropy_sum(forward(row, clean_TH)[0], row.gold)
        zero = torch.zeros((), device=total.device)
        return StepLoss(total, total.detach(), total.detach(), zero, zero, tokens)
    perturbation = PERTURBATIONS[run.perturbation]
    clean_pass = CleanPass(forward, model.backbone, row, clean_TH) if perturbation.adversarial else None
    delta_TH = perturbation.find(clean_pass, row, clean_TH, settings, noise)
    if clean_pass is None:
        both_TH = torch.cat([clean_TH, clean_TH + delta_TH.to(clean_TH.dtype)])
        clean_BC, perturbed_BC = forward(row.with_twin(row), both_TH)
    else:
        clean_BC, perturbed_BC = clean_pass.scores_BC, clean_pass.perturbed(delta_TH)
    cross_entropy = cross_entropy_sum(clean_BC, row.gold)
    divergence = divergence_sum(run.divergence, clean_BC, perturbed_BC, row.gold)
    total = cross_entropy + reg_weight_at(run, noise.step) * divergence
    objective = total if clean_pass is None else clean_pass.surrogate(total)
    delta_norm = example_norm(delta_TH, row).sum()
    parts = (total.detach(), cross_entropy.detach(), divergence.detach())
    return StepLoss(objective, *parts, delta_norm, tokens + row.num_tokens)
