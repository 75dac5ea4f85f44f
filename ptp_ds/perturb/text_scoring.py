"""What an attack on texts asks of the backbone: scores, gradients at token embeddings, and near words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.layerwise import PrefixCache
from ptp_ds.kernels.pack_embed import sum_rows
from ptp_ds.objective import cross_entropy_sum
from ptp_ds.perturb.neighbours import Neighbours
from ptp_ds.precision import at_least_fp32
from ptp_ds.tasks.example import Example


@dataclass(frozen=True)
class Gradients:
    """clean: scores [B, C]. packed: fp32 gradient [T, H] of the summed cross-entropy at the packed tokens' embeddings.

    places: for each example, where each token of its context lies among the packed tokens; negative in the prefix.
    """

    clean: Tensor
    packed: Tensor
    places: Sequence[Sequence[int]]


class TextScorer:
    """Texts under the prompt as it stands: nothing here leaves a gradient on it.

    examples: this rank's rows of the step. shared: leading tokens of every context that the prefix holds. The prefix is
    computed once, here; gradients and scores are one pass each. Under ZeRO-3 all ranks make a TextScorer and run the
    same passes, inside of backbone.shards.outside_layers(), whatever their rows are.
    """

    def __init__(
        self, backbone: Backbone, trained: Tensor, examples: Sequence[Example], shared: int, neighbours: Neighbours
    ) -> None:
        self.backbone, self.examples, self.shared, self.neighbours = backbone, examples, shared, neighbours
        self._trained = trained.detach().to(backbone.device)
        shared_ids = torch.tensor(examples[0].context_ids[:shared], dtype=torch.int64, device=backbone.device)
        self._prefix: PrefixCache = backbone.cache_prefix(self._trained, shared_ids)

    def gradients(self) -> Gradients:
        """Scores of the clean texts and the gradient at their tokens, by one forward and one backward."""
        rows = self.backbone.rows
        row = rows.pack(self.examples, self.shared).to(self.backbone.device)
        clean_TH = self.backbone.inputs(row, self._trained).detach().requires_grad_()
        with torch.enable_grad():
            scores_BC = self.backbone.score(row, clean_TH, self._trained, prefix=self._prefix)[0]
            (gradient_TH,) = torch.autograd.grad(cross_entropy_sum(scores_BC, row.gold), clean_TH)
        gradient_TH = at_least_fp32(gradient_TH)
        if row.moves_with is not None:  # a context that several blocks repeat
            gradient_TH = sum_rows(gradient_TH, row.moves_with, row.num_tokens, impl=self.backbone.kernels)
        places, first = [], 0
        for example, length in zip(self.examples, row.lengths, strict=True):
            places.append([first + place for place in rows.context_places(example, self.shared)])
            first += length
        return Gradients(scores_BC.detach(), gradient_TH, places)

    @torch.no_grad()
    def scores(self, groups: Sequence[Sequence[Example]]) -> Tensor:
        """[N, C] scores of the groups' texts, one behind the other, in one pass; a group's common start once."""
        row = self.backbone.rows.pack_groups(groups, self.shared).to(self.backbone.device)
        return self.backbone.score(row, self.backbone.inputs(row, self._trained), self._trained, prefix=self._prefix)[0]

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """[n, H] fp32 embeddings."""
        return at_least_fp32(self.backbone.embed(torch.tensor(tokens, dtype=torch.int64, device=self.backbone.device)))

    def near(self, tokens: Iterable[int]) -> dict[int, list[int]]:
        """Each token's neighbours, nearest first; see Neighbours."""
        return self.neighbours.of(self.backbone, tokens)
