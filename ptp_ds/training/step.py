"""The train step: what is computed for one packed row, in the order of the formula in ptp_ds.objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.trunks import RowPlan
from ptp_ds.config.run_config import RunConfig
from ptp_ds.kernels import dual_divergence
from ptp_ds.objective import confident, cross_entropy_sum
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import Noise, PerturbSettings, SharedPass
from ptp_ds.perturb.ascent import ascend
from ptp_ds.perturb.ball import example_norm
from ptp_ds.perturb.shared_pass import DEFAULT_PASS, PassOptions
from ptp_ds.training.engine import Engine
from ptp_ds.training.micro_batches import summed
from ptp_ds.training.schedules import reg_weight_at


@dataclass(frozen=True)
class StepLoss:
    """Sums over the row's examples, on the device. total carries the gradient; the rest is for the log.

    counted: examples whose divergence counts, where --min_confidence leaves some out.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    delta_norm: Tensor
    tokens: int
    delta: Tensor | None = None
    counted: Tensor | None = None


def settings_of(
    run: RunConfig, unit: float, mask_id: int = 0, vocabulary: int | None = None, room: int | None = None
) -> PerturbSettings:
    """The perturbation's settings; unit: the backbone's mean embedding norm, mask_id: the token that masks."""
    return PerturbSettings(
        unit=unit, sigma=run.sigma, epsilon=run.epsilon, alpha=run.step_length, steps=run.ascent_steps, norm=run.norm,
        divergence=run.divergence, mask_share=run.mask_share, mask_id=mask_id,
        a2t_share=run.a2t_share, kernels=run.kernels, own=run.own_settings,
        vocabulary=vocabulary, room=room,
    )  # fmt: skip


def ptp_loss(
    trained: Tensor, backbone: Backbone, row: PackedRow, run: RunConfig, settings: PerturbSettings, noise: Noise,
    options: PassOptions = DEFAULT_PASS,
) -> StepLoss:  # fmt: skip
    """The summed loss of one packed row, with its gradient to `trained`, all that is trained.

    Without a perturbation the pass is plain prompt tuning, the very same operations. Noise is known beforehand, so both
    streams run as one pass; an adversarial delta climbs against the clean scores first. For a perturbation in text
    space the row holds both streams already (pack_text_twins).
    """
    perturbation = run.active_perturbation
    if (perturbation is not None and perturbation.in_text) != (row.streams == 2):
        raise ValueError(f"--perturbation {run.perturbation} got a row of {row.streams} streams; see pack_text_twins.")
    delta_TH = None
    with backbone.shards.outside_layers():
        clean_TH = backbone.inputs(row, trained)
        tokens = backbone.prefix_length(trained, row) + row.num_tokens
        shared = None
        if row.streams == 1:
            shared = SharedPass(backbone, trained, row, clean_TH, options)
        if perturbation is None:
            assert shared is not None
            total = cross_entropy_sum(shared.clean(), row.gold)
            zero = torch.zeros((), device=total.device)
            return StepLoss(total, total.detach(), zero, zero, tokens)
        if perturbation.find is not None:
            delta_TH = perturbation.find(shared, row, clean_TH.detach(), settings, noise)
        if shared is not None:
            assert delta_TH is not None
            clean_BC, perturbed_BC = shared.both(delta_TH)
            tokens += row.num_tokens
        else:
            inputs_TH = clean_TH if delta_TH is None else row.moved(clean_TH, delta_TH)
            clean_BC, perturbed_BC = backbone.score(
                row, inputs_TH, trained, max_rows=options.max_rows, narrow=True, plan=options.plan
            )
    return loss_of_both(clean_BC, perturbed_BC, row, run, noise.step, tokens, delta_TH)


def loss_of_both(
    clean_BC: Tensor, perturbed_BC: Tensor, row: PackedRow, run: RunConfig, step: int, tokens: int,
    delta_TH: Tensor | None,
) -> StepLoss:  # fmt: skip
    """The objective of a row's clean and perturbed scores, and what is told of it."""
    of_label = run.confidence_in == "label"
    total, cross_entropy, divergence = dual_divergence(
        clean_BC, perturbed_BC, row.gold, run.divergence, reg_weight=reg_weight_at(run, step),
        clean_fixed=run.divergence_gradient == "clean_fixed", min_confidence=run.min_confidence, of_label=of_label,
        impl=run.kernels,
    )  # fmt: skip
    delta_norm = example_norm(delta_TH, row).sum() if delta_TH is not None else torch.zeros_like(total.detach())
    counted = None
    if run.min_confidence:
        counted = confident(clean_BC, run.min_confidence, row.gold if of_label else None).sum()
    return StepLoss(total, cross_entropy, divergence, delta_norm, tokens, delta_TH, counted)


def _ascent_scale(engine: Engine, global_count: int, parts: int) -> float:
    """Under fp16 a sixteenth of what training multiplies a row's loss by (see Engine.backward_sum, summed), so that
    ascents, whose losses are sums over rows, don't overflow where training doesn't; at least 1, and 1 without fp16."""
    of_row = engine.ranks.world / global_count if parts == 1 else 1.0
    return max(1.0, engine.loss_scale() * of_row / 16)


def most_rows(row: PackedRow, run: RunConfig, parts: int = 1) -> int:
    """Rows that a layer handles in one go: a micro-batch, which one of several parts is already."""
    return -(-row.num_examples // run.gradient_accumulation_steps) if parts == 1 else row.num_examples


def optimizer_step(
    engine: Engine, row: PackedRow, run: RunConfig, settings: PerturbSettings, noise: Noise, lr: float,
    *, global_count: int, carried_TH: Tensor | None = None,
) -> tuple[StepLoss, Tensor | None]:  # fmt: skip
    """One optimizer step on this rank's examples: forward, backward, update. Returns (loss, delta to carry on).

    `row` holds all of them; global_count: examples of the step over all ranks. The backbone's embeddings and head are
    gathered once, each layer once a pass.
    """
    loss, deltas = step_in_parts(engine, [row], [carried_TH], run, settings, noise, lr, global_count=global_count)
    return loss, deltas[0]


def step_in_parts(
    engine: Engine, rows: Sequence[PackedRow], carried: Sequence[Tensor | None], run: RunConfig,
    settings: PerturbSettings, noise: Noise, lr: float, *, global_count: int,
    plans: Sequence[RowPlan | None] | None = None, meanwhile: Callable[[], None] | None = None,
) -> tuple[StepLoss, list[Tensor | None]]:  # fmt: skip
    """optimizer_step on several rows, a micro-batch each, one after the other through all layers (micro_batches).

    carried: each row's deltas of the step before. plans: each row's, on its device, for most_rows of it at a time.
    meanwhile: what the host does while the device is at the backward: the update waits for it. Returns the loss of all
    rows and each one's delta to carry on.
    """
    scale, ascent_scale = engine.loss_scale(), _ascent_scale(engine, global_count, len(rows))

    def loss_of(trained: Tensor, part: tuple[PackedRow, Tensor | None, RowPlan | None]) -> tuple[Tensor, StepLoss]:
        row, mine, plan = part
        options = PassOptions(most_rows(row, run, len(rows)), mine, ascent_scale, plan)
        loss = ptp_loss(trained, engine.backbone, row, run, settings, noise, options)
        return loss.total, replace(loss, total=loss.total.detach())

    with engine.backbone.shards.outside_layers():
        parts = list(zip(rows, carried, plans or [None] * len(rows), strict=True))
        total, losses = summed(engine.trained(), parts, loss_of, scale)
        engine.backward_sum(total, global_count)
    if meanwhile is not None:
        meanwhile()
    engine.step(lr)
    dtype = engine.backbone.dtype
    deltas = [carried_delta(loss, row, run, settings, dtype) for loss, row in zip(losses, rows, strict=True)]
    return loss_of_all(losses), deltas


def loss_of_all(losses: Sequence[StepLoss]) -> StepLoss:
    """The sums over several rows; deltas are left out."""
    if len(losses) == 1:
        return losses[0]
    parts = [torch.stack([getattr(loss, name) for loss in losses]).sum()
             for name in ("total", "cross_entropy", "divergence", "delta_norm")]  # fmt: skip
    counts = [loss.counted for loss in losses if loss.counted is not None]
    counted = torch.stack(counts).sum() if counts else None
    total, cross_entropy, divergence, delta_norm = parts
    return StepLoss(total, cross_entropy, divergence, delta_norm, sum(loss.tokens for loss in losses), counted=counted)


def carried_delta(
    loss: StepLoss, row: PackedRow, run: RunConfig, settings: PerturbSettings, dtype: torch.dtype
) -> Tensor | None:
    """[T, H] the delta to carry on, moved along the gradient that the step's backward left; None where none is."""
    delta = loss.delta
    if delta is None or not run.carries:
        return None
    assert delta.grad is not None
    carried = ascend(delta, delta.grad, row, settings)
    if dtype == torch.float16:  # a step whose scaled gradient overflowed moves nothing
        carried = torch.where(carried.isfinite(), carried, delta.detach())
    return carried
