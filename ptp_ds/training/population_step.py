"""The train step of several prompts at once: one pass over all members' rows, a loss for each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.trunks import RowPlan
from ptp_ds.config.run_config import RunConfig
from ptp_ds.objective import cross_entropy_sum
from ptp_ds.packing.forest import join_rows, parts
from ptp_ds.packing.row import PackedRow
from ptp_ds.packing.transfer import Move, moved
from ptp_ds.perturb import Noise, PerturbSettings, SharedPass
from ptp_ds.perturb.ascent import moved_delta
from ptp_ds.perturb.shared_pass import DEFAULT_PASS, PassOptions, climbed_sum
from ptp_ds.training.step import StepLoss, loss_of_both, ptp_loss


@dataclass(frozen=True)
class MemberStep:
    """What one prompt of a population trains on in this step. carried: [T, H] deltas of the step before, if any."""

    run: RunConfig
    settings: PerturbSettings
    noise: Noise
    row: PackedRow
    carried: Tensor | None = None


@dataclass(frozen=True)
class PopulationRow:
    """members: what each prompt trains on; prompts: the rows of each among all that is trained, in the same order.

    row: all members' rows as one, each behind its own prompt; None where every member takes passes of its own. plan:
    the row's, where it was made before.
    """

    members: tuple[MemberStep, ...]
    prompts: tuple[int, ...]
    row: PackedRow | None
    plan: RowPlan | None = None

    def mapped(self, move: Move) -> "PopulationRow":
        """See Movable; what members carry stays where it is."""
        members = tuple(replace(member, row=member.row.mapped(move)) for member in self.members)
        row = None if self.row is None else self.row.mapped(move)
        return replace(self, members=members, row=row, plan=None if self.plan is None else self.plan.mapped(move))

    def to(self, device: torch.device) -> "PopulationRow":
        """The same on `device`, in one copy that nobody waits for."""
        return moved(self, device)

    def carrying(self, deltas: Sequence[Tensor | None]) -> "PopulationRow":
        """The same with each member's deltas of the step before."""
        members = zip(self.members, deltas, strict=True)
        return replace(self, members=tuple(replace(member, carried=delta) for member, delta in members))

    def split(self, tensor_TH: Tensor) -> tuple[Tensor, ...]:
        """Each member's part of a tensor over the row's tokens."""
        return tensor_TH.split([member.row.num_tokens for member in self.members])

    def parts(self, scores_BC: Tensor) -> list[Tensor]:
        """Each member's scores."""
        assert self.row is not None
        return parts(self.row, [member.row for member in self.members], scores_BC)


def population_row(members: Sequence[MemberStep], prompts: Sequence[int], joined: bool = True) -> PopulationRow:
    """prompts: rows of each member's prompt among all that is trained, in order. joined: Backbone.shares_passes."""
    row = join_rows([member.row for member in members], prompts) if joined else None
    return PopulationRow(tuple(members), tuple(prompts), row)


class _Alone:
    """What a perturbation's find is given in the place of a SharedPass: it climbs in passes of the member's own.

    Built-in perturbations that climb do so together (see _together) and never ask for one.
    """

    def __init__(self, open_pass: Callable[[], SharedPass], member: MemberStep, clean_TH: Tensor) -> None:
        self._open, self.row, self.clean_TH, self.carried_TH = open_pass, member.row, clean_TH, member.carried

    @cached_property
    def _pass(self) -> SharedPass:
        return self._open()

    def gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """See SharedPass.gradient."""
        return self._pass.gradient(delta_TH, divergence)

    def ascend(self, delta_TH: Tensor, settings: PerturbSettings) -> Tensor:
        """See SharedPass.ascend."""
        return self._pass.ascend(delta_TH, settings)


def population_loss(
    trained: Tensor, backbone: Backbone, population: PopulationRow, options: PassOptions = DEFAULT_PASS
) -> list[StepLoss]:
    """Each member's summed loss over its own rows, with its gradient to its rows of `trained`: ptp_loss for all.

    trained: the members' prompts, one behind the other. All members have the same perturbation; its sizes, lambda and
    the divergence are each one's own. The passes, their layers and gathers are those of one member where rows share
    them.
    """
    perturbation, row = population.members[0].run.active_perturbation, population.row
    with backbone.shards.outside_layers():
        if row is None:
            return [
                ptp_loss(prompt, backbone, member.row, member.run, member.settings, member.noise,
                         replace(options, carried=member.carried))
                for prompt, member in zip(trained.split(population.prompts), population.members, strict=True)
            ]  # fmt: skip
        clean_TH = backbone.inputs(row, trained)
        shared = SharedPass(backbone, trained, row, clean_TH, options) if row.streams == 1 else None
        if perturbation is None:
            assert shared is not None
            return [
                _plain(scores_BC, member, tokens)
                for scores_BC, member, tokens in zip(
                    population.parts(shared.clean()), population.members, _tokens(population, 1), strict=True
                )
            ]
        deltas: Sequence[Tensor | None] = [None] * len(population.members)
        if perturbation.find is not None:
            deltas = _found(shared, backbone, trained, population, clean_TH.detach(), options)
        delta_TH = torch.cat([delta for delta in deltas if delta is not None]) if perturbation.find else None
        if shared is not None:
            assert delta_TH is not None
            clean_BC, perturbed_BC = shared.both(delta_TH)
        else:
            inputs_TH = clean_TH if delta_TH is None else row.moved(clean_TH, delta_TH)
            clean_BC, perturbed_BC = backbone.score(
                row, inputs_TH, trained, max_rows=options.max_rows, narrow=True, plan=options.plan
            )
    scores = zip(population.parts(clean_BC), population.parts(perturbed_BC), strict=True)
    streams = 2 if shared is not None else 1
    return [
        loss_of_both(*pair, member.row, member.run, member.noise.step, tokens, delta)
        for pair, member, delta, tokens in zip(
            scores, population.members, deltas, _tokens(population, streams), strict=True
        )
    ]


def _tokens(population: PopulationRow, streams: int) -> list[int]:
    """Tokens that each member's rows take in the last pass, its prefix included."""
    return [
        prompt * (member.row.slots is None) + member.row.shared_ids.shape[0] + streams * member.row.num_tokens
        for prompt, member in zip(population.prompts, population.members, strict=True)
    ]


def _plain(scores_BC: Tensor, member: MemberStep, tokens: int) -> StepLoss:
    total = cross_entropy_sum(scores_BC, member.row.gold)
    zero = torch.zeros((), device=total.device)
    return StepLoss(total, total.detach(), zero, zero, tokens)


def _found(
    shared: SharedPass | None, backbone: Backbone, trained: Tensor, population: PopulationRow, clean_TH: Tensor,
    options: PassOptions,
) -> list[Tensor]:  # fmt: skip
    """Each member's delta, by its own settings and noise."""
    perturbation = population.members[0].run.active_perturbation
    assert perturbation is not None
    find = perturbation.start or perturbation.find
    assert find is not None
    prompts = trained.split(population.prompts)
    deltas = []
    for member, prompt, clean in zip(population.members, prompts, population.split(clean_TH), strict=True):
        alone = None
        if shared is not None:
            how = replace(options, carried=member.carried, plan=None)  # the plan is that of all members' rows

            def open_pass(prompt=prompt, member=member, clean=clean, how=how) -> SharedPass:
                return SharedPass(backbone, prompt.detach(), member.row, clean, how)

            alone = _Alone(open_pass, member, clean)
        deltas.append(find(alone, member.row, clean, member.settings, member.noise))  # type: ignore[arg-type]
    if perturbation.start is not None:
        assert shared is not None
        for _ in range(population.members[0].settings.steps):
            deltas = _together(shared, population, deltas)
    return deltas


def _together(shared: SharedPass, population: PopulationRow, deltas: Sequence[Tensor]) -> list[Tensor]:
    """The deltas after one step of ascent, all members' in one pass; SharedPass.ascend for each."""

    def climbed(clean_BC: Tensor, perturbed_BC: Tensor) -> Tensor:
        pairs = zip(population.parts(clean_BC), population.parts(perturbed_BC), population.members, strict=True)
        sums = [
            climbed_sum(clean, perturbed, member.row.gold, member.settings.divergence, member.settings.kernels)
            for clean, perturbed, member in pairs
        ]
        return torch.stack(sums).sum()

    gradients = population.split(shared.scaled_gradient(torch.cat(list(deltas)), climbed))
    moved = []
    for member, delta, gradient in zip(population.members, deltas, gradients, strict=True):
        moved.append(moved_delta(delta, gradient, member.row, member.settings)[0])
    return moved
