"""What a perturbation is given: settings, noise, the passes that it shares with the step, ascent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_ds.backbone import Backbone, Trunk, trunk_chunk
from ptp_ds.layerwise import LayerPass, Section, TrunkCache
from ptp_ds.objective import divergence_sum
from ptp_ds.packing import Example, PackedRow
from ptp_ds.perturb.ball import movable_only, project, random_start, steepest
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.precision import at_least_fp32
from ptp_ds.seeding import make_generator


@dataclass(frozen=True, kw_only=True)
class PerturbSettings:
    """sigma, epsilon, alpha are in units of `unit`, the backbone's mean embedding norm.

    sigma: root-mean-square l2 norm of a noisy token's delta. epsilon: radius of the ball (see perturb.ball for each
    norm). alpha: length of an ascent step. steps: K ascent steps. divergence: what the ascent climbs. mask_share: share
    of words that are masked. mask_id: the token that masks. a2t_share: share of words that a2t may swap.
    """

    unit: float
    sigma: float
    epsilon: float
    alpha: float
    steps: int
    norm: str
    divergence: str
    mask_share: float = 0.0
    mask_id: int = 0
    a2t_share: float = 0.0


@dataclass(frozen=True)
class Noise:
    """Random numbers of one optimizer step: drawn per example from (seed, purpose, step, example number).

    The same example in the same step gets the same noise on any rank, in any micro-batch, at any place of the row.
    """

    seed: int
    step: int

    def _per_example(self, row: PackedRow, width: int, purpose: str, fill: Callable) -> Tensor:
        device = row.token_ids.device
        parts = []
        for example, length in zip(row.example_ids, row.lengths, strict=True):
            generator = make_generator(self.seed, purpose, self.step, example, device=device)
            parts.append(fill(torch.empty(length, width, device=device), generator))
        return torch.cat(parts)

    def normal(self, row: PackedRow, width: int, purpose: str = "noise") -> Tensor:
        """[T, width] fp32 standard normal numbers."""
        return self._per_example(row, width, purpose, lambda out, gen: out.normal_(generator=gen))

    def uniform(self, row: PackedRow, width: int, purpose: str = "noise") -> Tensor:
        """[T, width] fp32 numbers, uniform in [-1, 1)."""
        return self._per_example(row, width, purpose, lambda out, gen: out.uniform_(-1.0, 1.0, generator=gen))


class SharedPass:
    """Prompt and clean rows, computed once, and any number of perturbed passes against them.

    The first ascent takes prompt and clean rows along, so that K ascents and the last pass are K + 1 passes; their
    graph is kept for the last one. Ascents take delta's gradient alone: none for the prompt, no pass over its tokens.
    max_rows: rows that a layer handles in one go (a micro-batch). carried_TH: the deltas of the step before, for a
    perturbation that carries them.
    """

    def __init__(
        self, backbone: Backbone, values: Tensor, row: PackedRow, clean_TH: Tensor, max_rows: int | None = None,
        carried_TH: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.carried_TH = carried_TH
        self.backbone, self.row, self.clean_TH = backbone, row, clean_TH
        self._values, self._in_rows = values, clean_TH.requires_grad  # the prompt's graph lies in the rows themselves
        self._source = backbone.trunk(values, row.trunk_ids)
        self._length = self._source.length
        self._chunks = backbone.chunks(row, self._length, max_rows)
        self._shared = [Section(chunk, graph=True, to_input=self._in_rows) for chunk in self._chunks]
        if self._source.inputs is not None:
            self._shared.insert(0, Section(trunk_chunk(self._length, clean_TH.device), graph=True))
        self._trunk: TrunkCache = {}
        self._recompute = backbone.activations.recompute(self._length + 2 * row.num_tokens)
        self._clean_BC: Tensor | None = None

    def clean(self) -> Tensor:
        """[B, C] clean scores with gradient to the prompt."""
        return self.row.scores(self._run(self._shared, None, self._source, live=None))[0]

    def gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """[T, H] fp32 gradient of the summed divergence at `delta_TH` (summed: rows don't depend on each other)."""
        delta = delta_TH.detach().requires_grad_()
        perturbed = [Section(chunk, graph=True, to_trunk=False) for chunk in self._chunks]
        if self._clean_BC is None:
            source = self._source.detached()
            logits = self._run([*self._shared, *perturbed], delta, source, live=perturbed, prompt=False)
            clean_BC, scores_BC = self.row.with_twin(self.row).scores(logits)
            self._clean_BC = clean_BC.detach()
        else:
            scores_BC = self.row.scores(self._run(perturbed, delta, None, live=perturbed, prompt=False))[0]
        objective = divergence_sum(divergence, self._clean_BC, scores_BC, self.row.gold)
        return at_least_fp32(torch.autograd.grad(objective, delta)[0])

    def both(self, delta_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Clean and perturbed scores [B, C] with gradient to the prompt, and to delta where it asks for one."""
        to_input = delta_TH.requires_grad or self._in_rows
        perturbed = [Section(chunk, graph=True, to_input=to_input) for chunk in self._chunks]
        logits = self._run([*self._shared, *perturbed], delta_TH, self._source, live=None)
        clean_BC, perturbed_BC = self.row.with_twin(self.row).scores(logits)
        return clean_BC, perturbed_BC

    def _run(
        self, sections: Sequence[Section], delta_TH: Tensor | None, trunk: Trunk | None,
        live: Sequence[Section] | None, prompt: bool = True,
    ) -> Tensor:  # fmt: skip
        """Logits of one pass: with a trunk its inputs, if any, and the clean rows; with a delta the perturbed ones.

        prompt: whether gradient goes to a prompt that stands in the rows, and to a trained head.
        """
        clean_TH, values = self.clean_TH, self._values
        if not prompt:
            clean_TH, values = clean_TH.detach(), values.detach()
        inputs, positions, behind = [], [], self.row.position_ids + self._length
        if trunk is not None and trunk.inputs is not None:
            inputs.append(trunk.inputs)
            positions.append(torch.arange(self._length, device=behind.device))
        if trunk is not None:
            inputs.append(clean_TH)
            positions.append(behind)
        if delta_TH is not None:
            inputs.append(self.row.moved(clean_TH, delta_TH))
            positions.append(behind)
        given = trunk.values if trunk is not None else None
        layer_pass = LayerPass(sections, self._trunk, self._recompute, live, given)
        return self.backbone.run(layer_pass, torch.cat(inputs), torch.cat(positions), values)


def start_delta(row: PackedRow, width: int, settings: PerturbSettings, noise: Noise) -> Tensor:
    """[T, width] a random point of the ball, zero where nothing may move: where ascent begins."""
    radius = settings.epsilon * settings.unit
    start = movable_only(noise.uniform(row, width, "start"), row)
    return project(random_start(start, row, settings.norm, radius), row, settings.norm, radius)


def ascend(delta_TH: Tensor, gradient_TH: Tensor, row: PackedRow, settings: PerturbSettings) -> Tensor:
    """delta after one step of length alpha along the steepest direction, projected into the ball."""
    radius, length = settings.epsilon * settings.unit, settings.alpha * settings.unit
    step = steepest(movable_only(gradient_TH, row), row, settings.norm, length)
    return project(delta_TH.detach() + step, row, settings.norm, radius)


@dataclass(frozen=True)
class Twin:
    """A context in other words. movable: which of its tokens may still get a delta."""

    context_ids: Sequence[int]
    movable: Sequence[bool]


Find = Callable[["SharedPass | None", PackedRow, Tensor, PerturbSettings, Noise], Tensor]


@dataclass(frozen=True)
class Attacked:
    """An attack's twins, and what the log tells of it: by name, (this rank's sum, the sum that it is a share of)."""

    twins: Sequence[Twin]
    shares: dict[str, tuple[float, float]]


Twins = Callable[[Sequence[Example], PerturbSettings, Noise], list[Twin]]
Attack = Callable[[TextScorer, PerturbSettings], Attacked]


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """How the second stream differs: in embedding space, in text space, or in both.

    find(shared, row, clean_TH, settings, noise) -> delta_TH. twins(examples, settings, noise) -> each example's context
    in other words; attack(scorer, settings) the same for the scorer's examples, found with its losses and gradients.
    Beside either, find gets no SharedPass and adds to the twins' tokens. sizes: settings that make it zero where
    they are 0. reads: flags it reads besides. carries: whether a batch is used for K optimizer steps, its delta moved
    after each (see ascend).
    """

    find: Find | None = None
    twins: Twins | None = None
    attack: Attack | None = None
    sizes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    carries: bool = False

    @property
    def in_text(self) -> bool:
        """Whether the second stream has other tokens than the clean one."""
        return self.twins is not None or self.attack is not None
