"""The generic path: families whose attention takes no function from outside run their own forward on padded rows.

Every block of a packed row is one row of a padded batch, clean and perturbed ones together in one forward. As exact as
the packed path, since nothing of the family's own is replaced; slower, since nothing is shared or left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptp_ds.attention.backends import without_cudnn
from ptp_ds.backbone import verbalizers
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.layerwise import LayerPass
from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import Rows, SeparateRows


class PaddedBackbone(Backbone):
    """A Backbone that pads. Takes the model of one that was refused; soft prompts only, and not under ZeRO-3."""

    packs = False

    def __init__(self, refused: Backbone) -> None:
        nn.Module.__init__(self)
        refused.release()
        self.model, self.head, self.shards = refused.model, refused.head, refused.shards
        self.activations, self.kernels = Activations(), refused.kernels
        self.first_position = refused.first_position
        self.output, self.narrows = verbalizers.narrow_head(self.model), False
        self.serve("soft", refused.rows)

    def serve(self, prompt: str, rows: Rows, prompt_length: int = 0) -> None:
        """Rows that share something become rows of their own; ValueError for a deep prompt."""
        if prompt != "soft":
            family = self.model.config.model_type
            raise UserError(f"--prompt {prompt} needs the packed path, which {family!r} can't take; use --prompt soft.")
        if not isinstance(rows, SeparateRows):
            rows = SeparateRows(kind="causal", prompt_length=prompt_length)
        self.prompt, self.rows = prompt, rows

    def run(
        self, layer_pass: LayerPass, inputs_TH: Tensor, positions_T: Tensor, trained: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [N, V] (or [N, classes]) at the scored positions of the pass' sections, in order."""
        chunks = [section.chunk for section in layer_pass.sections]
        lengths = [block.length for chunk in chunks for block in chunk.plan.blocks]
        mask, places = padding(lengths, inputs_TH.device)
        padded = inputs_TH.index_select(0, places.clamp_min(0).flatten()).view(*places.shape, -1)
        padded = padded.masked_fill(~mask[..., None], 0.0)
        arguments: dict[str, Any] = {"inputs_embeds": padded, "attention_mask": mask.long()}
        if self.head.kind == "seq2seq":
            with without_cudnn():
                return self._decode(arguments, [target for chunk in chunks for target in chunk.targets])
        if self.head.kind == "causal":
            arguments["use_cache"] = False
        with verbalizers.use_columns(columns), without_cudnn():
            logits = self.call_model(trained, **arguments).logits
        if self.head.kind == "classes":
            return logits
        return logits[mask].index_select(0, layer_pass.scored())

    def _decode(self, arguments: dict[str, Any], targets: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Logits [N, V] of every answer's tokens: each row through the encoder once, then once a answer of its own."""
        encoded = self.model.get_encoder()(**arguments)
        hidden = encoded.last_hidden_state
        counts = torch.tensor([len(answers) for answers in targets], device=hidden.device)
        owners = torch.repeat_interleave(torch.arange(len(targets), device=hidden.device), counts)
        start = self.model.config.decoder_start_token_id
        inputs = [[start, *answer[:-1]] for answers in targets for answer in answers]
        mask, places = padding([len(ids) for ids in inputs], hidden.device)
        flat = torch.tensor([token for ids in inputs for token in ids], device=hidden.device)
        out = self.model(
            encoder_outputs=type(encoded)(last_hidden_state=hidden.index_select(0, owners)),
            attention_mask=arguments["attention_mask"].index_select(0, owners), use_cache=False,
            decoder_input_ids=flat[places.clamp_min(0)],
        )  # fmt: skip
        return out.logits[mask]


def padding(lengths: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(which places of the padded rows are real [R, L] bool, the token of each, -1 where none [R, L])."""
    sizes = torch.tensor(lengths, device=device)
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(max(lengths), device=device)[None]
    mask = places < sizes[:, None]
    return mask, torch.where(mask, starts[:, None] + places, -1)
