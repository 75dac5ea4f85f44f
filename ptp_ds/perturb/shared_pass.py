"""What a perturbation and the step share: the prompt and the clean rows, computed once for all passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.layerwise import LayerPass, PrefixCache, Section
from ptp_ds.backbone.trunks import RowPlan, SharedPrefix
from ptp_ds.kernels import dual_divergence
from ptp_ds.kernels.pack_embed import sum_rows
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.ascent import moved_delta
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.precision import at_least_fp32


@dataclass(frozen=True)
class PassOptions:
    """max_rows: rows that a layer handles in one go (a micro-batch). carried: [T, H] deltas of the step before, for a
    perturbation that carries them. ascent_scale: what ascents' losses are multiplied by, for gradients in fp16; the
    steepest direction is the same. plan: the row's, on its device, where it was made before (Backbone.plan).
    """

    max_rows: int | None = None
    carried: Tensor | None = None
    ascent_scale: float = 1.0
    plan: RowPlan | None = None


DEFAULT_PASS = PassOptions()
Climbed = Callable[[Tensor, Tensor], Tensor]


def climbed_sum(clean_BC: Tensor, perturbed_BC: Tensor, gold_B: Tensor, divergence: str, kernels: str) -> Tensor:
    """The summed divergence that an ascent climbs, the clean scores being constants."""
    return dual_divergence(
        clean_BC, perturbed_BC, gold_B, divergence, ce_weight=0.0, reg_weight=1.0, impl=kernels
    ).total


class SharedPass:
    """Prompt and clean rows, computed once, and any number of perturbed passes against them.

    The first ascent takes prompt and clean rows along, so that K ascents and the last pass are K + 1 passes; their
    graph is kept for the last one. Ascents take delta's gradient alone: none for the prompt, no pass over its tokens.
    Where all candidates are single tokens, scores are their logits, not normalised.
    """

    def __init__(
        self, backbone: Backbone, trained: Tensor, row: PackedRow, clean_TH: Tensor,
        options: PassOptions = DEFAULT_PASS,
    ) -> None:  # fmt: skip
        self.backbone, self.row, self.clean_TH = backbone, row, clean_TH
        self.carried_TH, self._ascent_scale = options.carried, options.ascent_scale
        self._scored = backbone.narrow(row)
        self._trained, self._in_rows = trained, clean_TH.requires_grad  # the prompt's graph lies in the rows themselves
        self._source = backbone.prefix(trained, row.shared_ids, row.trunks)
        plan = options.plan or backbone.plan(row, self._source.lengths, options.max_rows).to(clean_TH.device)
        assert plan.is_of(row, self._source.lengths), "a plan of another row"
        self._positions, self._chunks = plan.positions(row), plan.chunks
        self._shared = [Section(chunk, graph=True, to_input=self._in_rows) for chunk in self._chunks]
        if self._source.ids is not None:
            self._shared.insert(0, Section(plan.prefix, graph=True))
        self._prefix: PrefixCache = {}
        tokens = self._source.length + 2 * row.num_tokens
        self._recomputed = backbone.recomputed(tokens)
        self._clean_BC: Tensor | None = None
        self._moved: tuple[Tensor, int, Tensor] | None = None  # the last ascent's delta, its version, its inputs

    def clean(self) -> Tensor:
        """[B, C] clean scores with gradient to the prompt."""
        return self._scored.scores(
            self._run(self._shared, self._inputs(self._source, None), self._source, None)
        ).squeeze(0)

    def gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """[T, H] fp32 gradient of the summed divergence at `delta_TH` (summed: rows don't depend on each other)."""
        return at_least_fp32(self.scaled_gradient(delta_TH.detach(), self._climbed(divergence))) / self._ascent_scale

    def ascend(self, delta_TH: Tensor, settings: PerturbSettings) -> Tensor:
        """delta after one step of ascent on the divergence; see `ascend`."""
        gradient = self.scaled_gradient(delta_TH, self._climbed(settings.divergence))
        delta, moved = moved_delta(delta_TH, gradient, self.row, settings, self.clean_TH.detach())
        assert moved is not None
        if self.backbone.dtype == torch.float16:  # an overflow leaves its example where it was
            return torch.where(delta.isfinite(), delta, delta_TH)
        self._moved = delta, delta._version, moved
        return delta

    def both(self, delta_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Clean and perturbed scores [B, C] with gradient to the prompt, and to delta where it asks for one."""
        to_input = delta_TH.requires_grad or self._in_rows
        perturbed = [Section(chunk, graph=True, to_input=to_input) for chunk in self._chunks]
        inputs = self._inputs(self._source, delta_TH)
        logits = self._run([*self._shared, *perturbed], inputs, self._source, None)
        clean_BC, perturbed_BC = self._scored.with_twin(self._scored).scores(logits)
        return clean_BC, perturbed_BC

    def _climbed(self, divergence: str) -> Climbed:
        """The divergence summed over all rows."""

        def total(clean_BC: Tensor, perturbed_BC: Tensor) -> Tensor:
            return climbed_sum(clean_BC, perturbed_BC, self.row.gold, divergence, self.backbone.kernels)

        return total

    def scaled_gradient(self, delta_TH: Tensor, climbed: Climbed) -> Tensor:
        """[T, H] ascent_scale times the gradient, in the backbone's dtype where no token takes another's delta.

        climbed: what is climbed, of clean and perturbed scores [B, C].
        """
        perturbed = [Section(chunk, graph=True, to_prefix=False) for chunk in self._chunks]
        row, source = self._scored, None if self._clean_BC is not None else self._source.detached()
        inputs = self._inputs(source, delta_TH, prompt=False).detach().requires_grad_()
        if self._clean_BC is None:
            logits = self._run([*self._shared, *perturbed], inputs, source, live=perturbed, prompt=False)
            clean_BC, scores_BC = row.with_twin(row).scores(logits)
            self._clean_BC = clean_BC.detach()
        else:
            scores_BC = row.scores(self._run(perturbed, inputs, None, live=perturbed, prompt=False)).squeeze(0)
        total = climbed(self._clean_BC, scores_BC) * self._ascent_scale
        gradient = torch.autograd.grad(total, inputs)[0][-row.num_tokens :]
        if row.moves_with is None:
            return gradient
        return sum_rows(gradient, row.moves_with, row.num_tokens, impl=self.backbone.kernels)

    def _inputs(self, prefix: SharedPrefix | None, delta_TH: Tensor | None, prompt: bool = True) -> Tensor:
        """[N, H] inputs of a pass: with a prefix its own, if any, and the clean rows; with a delta the perturbed ones.

        prompt: whether gradient goes to a prompt that stands among them.
        """
        if prefix is None and self._moved is not None:
            delta, version, moved = self._moved
            if delta is delta_TH and delta._version == version:  # else a file has changed it in place
                return moved
        trained = self._trained if prompt else self._trained.detach()
        ids = prefix.ids if prefix is not None else None
        return self.backbone.inputs(self.row, trained, ids, clean=prefix is not None, delta_TH=delta_TH)

    def _run(
        self, sections: Sequence[Section], inputs_NH: Tensor, prefix: SharedPrefix | None,
        live: Sequence[Section] | None, prompt: bool = True,
    ) -> Tensor:  # fmt: skip
        """Logits of one pass over the sections' inputs. prompt: whether gradient goes to a trained head."""
        tokens = sum(section.chunk.length for section in sections if not section.chunk.is_prefix)
        positions = [self._positions] * (tokens // self.row.num_tokens)
        if sections[0].chunk.is_prefix:
            positions.insert(0, self._source.positions(inputs_NH.device))
        given = prefix.keys_values if prefix is not None else None
        layer_pass = LayerPass(sections, self._prefix, self._recomputed, live, given)
        trained = self._trained if prompt else self._trained.detach()
        return self.backbone.run(layer_pass, inputs_NH, torch.cat(positions), trained, self._scored.columns)
