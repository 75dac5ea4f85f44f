"""What a perturbation is given: settings, noise, the passes that it shares with the step, ascent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone, SharedPrefix, prefix_chunk
from ptp_ds.backbone.layerwise import LayerPass, PrefixCache, Section
from ptp_ds.kernels import dual_divergence, noise, perturb_step
from ptp_ds.kernels.pack_embed import sum_rows
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.ball import radius_of
from ptp_ds.perturb.text_scoring import TextScorer
from ptp_ds.precision import at_least_fp32
from ptp_ds.seeding import derive_seed
from ptp_ds.tasks.example import Example


@dataclass(frozen=True, kw_only=True)
class PerturbSettings:
    """sigma, epsilon, alpha are in units of `unit`, the backbone's mean embedding norm.

    sigma: root-mean-square l2 norm of a noisy token's delta. epsilon: radius of the ball (see perturb.ball for each
    norm). alpha: length of an ascent step. steps: K ascent steps. divergence: what the ascent climbs. mask_share: share
    of words that are masked. mask_id: the token that masks. a2t_share: share of words that a2t may swap. kernels: which
    implementation of ptp_ds.kernels runs.
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
    kernels: str = "auto"


@dataclass(frozen=True)
class Noise:
    """Random numbers of one optimizer step: those of (seed, purpose, step, example number), see ptp_ds.kernels.noise.

    The same example in the same step gets the same noise on any rank, in any micro-batch, at any place of the row.
    kernels: which implementation draws them.
    """

    seed: int
    step: int
    kernels: str = "auto"

    def normal(self, row: PackedRow, width: int, purpose: str = "noise", scale: float = 1.0) -> Tensor:
        """[T, width] fp32 normal numbers of deviation `scale`, zero on tokens that may not move."""
        return self._draw("normal", row, width, purpose, scale)

    def uniform(
        self, row: PackedRow, width: int, purpose: str = "noise", scale: float = 1.0, norm: str | None = None
    ) -> Tensor:
        """[T, width] fp32 numbers, uniform in [-scale, scale), zero on tokens that may not move.

        norm: instead scaled so that each example ("frobenius") or token ("token_l2") has norm `scale`.
        """
        return self._draw("uniform", row, width, purpose, scale, norm)

    def _draw(
        self, kind: str, row: PackedRow, width: int, purpose: str, scale: float, norm: str | None = None
    ) -> Tensor:
        key = derive_seed(self.seed, purpose)
        return noise(kind, key, self.step, row.places, width, scale, norm=norm, impl=self.kernels)


class SharedPass:
    """Prompt and clean rows, computed once, and any number of perturbed passes against them.

    The first ascent takes prompt and clean rows along, so that K ascents and the last pass are K + 1 passes; their
    graph is kept for the last one. Ascents take delta's gradient alone: none for the prompt, no pass over its tokens.
    max_rows: rows that a layer handles in one go (a micro-batch). carried_TH: the deltas of the step before, for a
    perturbation that carries them. ascent_scale: what ascents' losses are multiplied by, for gradients in fp16; the
    steepest direction is the same. Where all candidates are single tokens, scores are their logits, not normalised.
    """

    def __init__(
        self, backbone: Backbone, trained: Tensor, row: PackedRow, clean_TH: Tensor, max_rows: int | None = None,
        carried_TH: Tensor | None = None, ascent_scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.carried_TH = carried_TH
        self.backbone, self.row, self.clean_TH, self._ascent_scale = backbone, row, clean_TH, ascent_scale
        self._scored = backbone.narrow(row)
        self._trained, self._in_rows = trained, clean_TH.requires_grad  # the prompt's graph lies in the rows themselves
        self._source = backbone.prefix(trained, row.shared_ids)
        self._length = self._source.length
        self._chunks = backbone.chunks(row, self._length, max_rows)
        self._shared = [Section(chunk, graph=True, to_input=self._in_rows) for chunk in self._chunks]
        if self._source.ids is not None:
            self._shared.insert(0, Section(prefix_chunk(self._length, clean_TH.device), graph=True))
        self._prefix: PrefixCache = {}
        self._recompute = backbone.activations.recompute(self._length + 2 * row.num_tokens)
        self._clean_BC: Tensor | None = None
        self._moved: tuple[Tensor, Tensor] | None = None  # the last ascent's delta, and the inputs that it moved

    def clean(self) -> Tensor:
        """[B, C] clean scores with gradient to the prompt."""
        return self._scored.scores(self._run(self._shared, self._inputs(self._source, None), self._source, None))[0]

    def gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """[T, H] fp32 gradient of the summed divergence at `delta_TH` (summed: rows don't depend on each other)."""
        return at_least_fp32(self._gradient(delta_TH.detach(), divergence)) / self._ascent_scale

    def ascend(self, delta_TH: Tensor, settings: PerturbSettings) -> Tensor:
        """delta after one step of ascent on the divergence; see `ascend`."""
        gradient = self._gradient(delta_TH, settings.divergence)
        delta, moved = _step(delta_TH, gradient, self.row, settings, self.clean_TH.detach())
        assert moved is not None
        if self._ascent_scale != 1.0:  # under fp16: an overflow leaves its example where it was
            return torch.where(delta.isfinite(), delta, delta_TH)
        self._moved = delta, moved
        return delta

    def both(self, delta_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Clean and perturbed scores [B, C] with gradient to the prompt, and to delta where it asks for one."""
        to_input = delta_TH.requires_grad or self._in_rows
        perturbed = [Section(chunk, graph=True, to_input=to_input) for chunk in self._chunks]
        inputs = self._inputs(self._source, delta_TH)
        logits = self._run([*self._shared, *perturbed], inputs, self._source, None)
        clean_BC, perturbed_BC = self._scored.with_twin(self._scored).scores(logits)
        return clean_BC, perturbed_BC

    def _gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """[T, H] ascent_scale times the gradient, in the backbone's dtype where no token takes another's delta."""
        perturbed = [Section(chunk, graph=True, to_prefix=False) for chunk in self._chunks]
        row, source = self._scored, None if self._clean_BC is not None else self._source.detached()
        inputs = self._inputs(source, delta_TH, prompt=False).detach().requires_grad_()
        if self._clean_BC is None:
            logits = self._run([*self._shared, *perturbed], inputs, source, live=perturbed, prompt=False)
            clean_BC, scores_BC = row.with_twin(row).scores(logits)
            self._clean_BC = clean_BC.detach()
        else:
            scores_BC = row.scores(self._run(perturbed, inputs, None, live=perturbed, prompt=False))[0]
        kernels = self.backbone.kernels
        loss = dual_divergence(
            self._clean_BC, scores_BC, row.gold, divergence, ce_weight=0.0, reg_weight=1.0, impl=kernels
        )
        gradient = torch.autograd.grad(loss.total * self._ascent_scale, inputs)[0][-row.num_tokens :]
        return gradient if row.moves_with is None else sum_rows(gradient, row.moves_with, row.num_tokens, impl=kernels)

    def _inputs(self, prefix: SharedPrefix | None, delta_TH: Tensor | None, prompt: bool = True) -> Tensor:
        """[N, H] inputs of a pass: with a prefix its own, if any, and the clean rows; with a delta the perturbed ones.

        prompt: whether gradient goes to a prompt that stands among them.
        """
        if prefix is None and self._moved is not None and self._moved[0] is delta_TH:
            return self._moved[1]
        trained = self._trained if prompt else self._trained.detach()
        ids = prefix.ids if prefix is not None else None
        return self.backbone.inputs(self.row, trained, ids, clean=prefix is not None, delta_TH=delta_TH)

    def _run(
        self, sections: Sequence[Section], inputs_NH: Tensor, prefix: SharedPrefix | None,
        live: Sequence[Section] | None, prompt: bool = True,
    ) -> Tensor:  # fmt: skip
        """Logits of one pass over the sections' inputs. prompt: whether gradient goes to a trained head."""
        behind = self.row.position_ids + self._length
        tokens = sum(section.chunk.length for section in sections if not section.chunk.is_prefix)
        positions = [behind] * (tokens // self.row.num_tokens)
        if sections[0].chunk.is_prefix:
            positions.insert(0, torch.arange(self._length, device=behind.device))
        given = prefix.keys_values if prefix is not None else None
        layer_pass = LayerPass(sections, self._prefix, self._recompute, live, given)
        trained = self._trained if prompt else self._trained.detach()
        return self.backbone.run(layer_pass, inputs_NH, torch.cat(positions), trained, self._scored.columns)


def start_delta(row: PackedRow, width: int, settings: PerturbSettings, noise: Noise) -> Tensor:
    """[T, width] a random point of the ball, zero where nothing may move: where ascent begins.

    Half of the radius in the ball's norm, or uniform in the cube. Never zero: the gradient of a divergence at delta = 0
    is exactly zero (VAT), so ascent can't start there.
    """
    radius = radius_of(settings.norm, settings.epsilon * settings.unit, width)
    if settings.norm == "linf":
        return noise.uniform(row, width, "start", radius)
    return noise.uniform(row, width, "start", 0.5 * radius, settings.norm)


def ascend(delta_TH: Tensor, gradient_TH: Tensor, row: PackedRow, settings: PerturbSettings) -> Tensor:
    """delta after one step of length alpha along the steepest direction, projected into the ball."""
    return _step(delta_TH.detach(), gradient_TH, row, settings)[0]


def _step(
    delta_TH: Tensor, gradient_TH: Tensor, row: PackedRow, settings: PerturbSettings, embeds_TH: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    width = delta_TH.shape[1]
    radius, length = (
        radius_of(settings.norm, size * settings.unit, width) for size in (settings.epsilon, settings.alpha)
    )
    return perturb_step(
        delta_TH, gradient_TH, row.places, norm=settings.norm, radius=radius, length=length, embeds_TH=embeds_TH,
        impl=settings.kernels,
    )  # fmt: skip


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
