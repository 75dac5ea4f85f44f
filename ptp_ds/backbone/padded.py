"""The generic path: families whose attention takes no function from outside run their own forward on padded rows.

Every block of a packed row is one row of a padded batch, clean and perturbed ones together in one forward. As exact as
the packed path, since nothing of the family's own is replaced; slower, since nothing is shared or left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptp_ds.attention.backends import without_cudnn
from ptp_ds.backbone import verbalizers
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.layerwise import LayerPass
from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import Rows, SeparateRows
from ptp_ds.packing.transfer import to_device


class PaddedBackbone(Backbone):
    """A Backbone that pads. Takes the model of one that was refused; soft prompts only, and not under ZeRO-3."""

    packs = False

    def __init__(self, refused: Backbone) -> None:
        nn.Module.__init__(self)
        refused.release()
        self.model, self.head, self.shards = refused.model, refused.head, refused.shards
        self.activations, self.kernels, self.fused = Activations(), refused.kernels, refused.fused
        self.joint, self.joined = refused.joint, refused.joined
        self.first_position = refused.first_position
        self.output, self.narrows = verbalizers.narrow_head(self.model), False
        self.serve("soft", refused.rows)

    def serve(self, prompt: str, rows: Rows, prompt_length: int = 0) -> None:
        """As a Backbone's; ValueError for a deep prompt."""
        if prompt != "soft":
            family = self.model.config.model_type
            raise UserError(f"--prompt {prompt} needs the packed path, which {family!r} can't take; use --prompt soft.")
        super().serve(prompt, rows, prompt_length)

    def form_of(self, rows: Rows, prompt_length: int) -> Rows:
        """Rows that share something become rows of their own."""
        return rows if isinstance(rows, SeparateRows) else SeparateRows(kind="causal", prompt_length=prompt_length)

    def recomputed(self, tokens: int) -> int:
        """None: layers are the family's own here."""
        return 0

    def run(
        self, layer_pass: LayerPass, inputs_TH: Tensor, positions_T: Tensor, trained: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [N, V] (or [N, classes]) at the scored positions of the pass' sections, in order."""
        chunks = [section.chunk for section in layer_pass.sections]
        layout = padding([block.length for chunk in chunks for block in chunk.plan.blocks], inputs_TH.device)
        padded = inputs_TH.index_select(0, layout.tokens.flatten()).view(*layout.mask.shape, -1)
        padded = padded.masked_fill(~layout.mask[..., None], 0.0)
        arguments: dict[str, Any] = {"inputs_embeds": padded, "attention_mask": layout.mask.long()}
        if self.head.kind == "seq2seq":
            with without_cudnn():
                return self._decode(arguments, [target for chunk in chunks for target in chunk.targets])
        if self.head.kind == "causal":
            arguments["use_cache"] = False
        with verbalizers.use_columns(columns), without_cudnn():
            logits = self.call_model(trained, **arguments).logits
        if self.head.kind == "classes":
            return logits
        return logits.flatten(0, 1).index_select(0, layout.places.index_select(0, layer_pass.scored))

    def _decode(self, arguments: dict[str, Any], targets: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Logits [N, V] of every answer's tokens: each row through the encoder once, then once a answer of its own."""
        encoded = self.model.get_encoder()(**arguments)
        hidden, start = encoded.last_hidden_state, self.model.config.decoder_start_token_id
        inputs = [[start, *answer[:-1]] for answers in targets for answer in answers]
        layout = padding([len(ids) for ids in inputs], hidden.device)
        owners, flat = to_device(
            [torch.tensor([row for row, answers in enumerate(targets) for _ in answers]),
             torch.tensor([token for ids in inputs for token in ids])], hidden.device,
        )  # fmt: skip
        out = self.model(
            encoder_outputs=type(encoded)(last_hidden_state=hidden.index_select(0, owners)),
            attention_mask=arguments["attention_mask"].index_select(0, owners), use_cache=False,
            decoder_input_ids=flat[layout.tokens],
        )  # fmt: skip
        return out.logits.flatten(0, 1).index_select(0, layout.places)


@dataclass(frozen=True)
class Layout:
    """R rows of different lengths padded to L tokens. mask [R, L] bool: which places are real; tokens [R, L]: the token
    of each, 0 where none; places [T]: where each token lies among the R * L."""

    mask: Tensor
    tokens: Tensor
    places: Tensor


def padding(lengths: Sequence[int], device: torch.device) -> Layout:
    """The layout of rows that lie one behind the other, made on the host: no copy of it is waited for."""
    sizes, width = np.array(lengths), max(lengths)
    mask = np.arange(width) < sizes[:, None]
    tokens = np.where(mask, (np.cumsum(sizes) - sizes)[:, None] + np.arange(width), 0)
    return Layout(*to_device([torch.from_numpy(x) for x in (mask, tokens, np.flatnonzero(mask))], device))
