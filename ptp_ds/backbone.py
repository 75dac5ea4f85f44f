"""The frozen language model: packed scoring through transformers' public interfaces, and its start-up check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptp_ds.activations import Activations, SavedBytes
from ptp_ds.attention import ATTENTION_NAME, holding, local_sizes
from ptp_ds.flash_attention import prove
from ptp_ds.frozen_ops import replace_frozen
from ptp_ds.layerwise import Chunk, LayerPass, LayerStack, Section, TrunkCache, detached, passing
from ptp_ds.packing import Example, PackedRow, pack, shared_start
from ptp_ds.prompts.deep import split_deep
from ptp_ds.seeding import make_generator
from ptp_ds.sharding import Shards
from ptp_ds.tree_attention import attend_reference
from ptp_ds.tree_plan import plan_tree

_LONG_ROPE = {"dynamic", "longrope"}  # rotary frequencies that depend on the longest position of the whole row


class Backbone(nn.Module):
    """A causal transformers model that is never trained, never in train mode, and sees packed rows only.

    model: any *ForCausalLM whose attention goes through AttentionInterface and whose forward takes inputs_embeds,
    position_ids and logits_to_keep. Its files are neither copied nor patched: each layer object's forward follows
    ptp_ds.layerwise, everything else is the family's own.
    """

    model: Any  # a transformers model; its methods are found at run time

    def __init__(self, model: Any, activations: Activations | None = None, prompt: str = "soft") -> None:
        super().__init__()
        self.prompt = prompt  # "soft": the prompt is token embeddings [P, H]; "deep": every layer's keys and values
        self.model = model.eval().requires_grad_(False)
        self.activations = activations or Activations()
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except (ValueError, ImportError, AttributeError):
            raise ValueError(refusal(model, "it accepts no attention function from outside")) from None
        layers = decoder_layers(model)
        self.shards = Shards(layers, model)
        with self.shards.layer(0):
            replace_frozen(layers[0].modules() if layers else (), list(model.modules()))
        self.stack = LayerStack(layers, self.shards)

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen model has no dropout, so both streams of a row see the same function."""
        return super().train(False)

    @property
    def width(self) -> int:
        """H: length of a token embedding."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H] frozen token embeddings, no gradient."""
        with torch.no_grad(), self.shards.edges():
            return self.model.get_input_embeddings()(token_ids)

    def chunks(self, row: PackedRow, trunk_keys: int, max_rows: int | None = None) -> list[Chunk]:
        """The row cut between blocks: at most activations.chunk_tokens tokens (or one block) and max_rows blocks."""
        cuts, tokens = [0], 0
        for number, block in enumerate(row.blocks):
            full = max_rows is not None and number - cuts[-1] >= max_rows
            if number > cuts[-1] and (full or tokens + block.length > self.activations.chunk_tokens):
                cuts.append(number)
                tokens = 0
            tokens += block.length
        return [
            _chunk(row, first, last, trunk_keys) for first, last in zip(cuts, [*cuts[1:], len(row.blocks)], strict=True)
        ]

    def run(self, layer_pass: LayerPass, inputs_TH: Tensor, positions_T: Tensor) -> Tensor:
        """Logits [N, V] at the scored positions of the pass' sections, in order."""
        prove(inputs_TH.device, inputs_TH.dtype, attend_reference)
        with passing(layer_pass), self.shards.edges():
            out = self.model(
                inputs_embeds=inputs_TH[None], position_ids=positions_T[None], use_cache=False,
                logits_to_keep=layer_pass.scored(),
            )  # fmt: skip
        return out.logits[0]

    def score(
        self,
        row: PackedRow,
        embeds_TH: Tensor,
        prompt_PH: Tensor | None = None,
        trunk: TrunkCache | None = None,
        max_rows: int | None = None,
    ) -> Tensor:
        """Candidate log-probabilities [S, B, C] of a packed row in one pass.

        Give prompt_PH to compute the trunk in this pass, or `trunk`, a cache of it, to attend to it without computing
        it again. max_rows: blocks that a layer handles in one go.
        """
        if (prompt_PH is None) == (trunk is None):
            raise ValueError("score needs either prompt_PH or trunk, one of the two.")
        graph = torch.is_grad_enabled()
        given = prompt_PH is not None
        source = self.trunk(prompt_PH, row.trunk_ids) if prompt_PH is not None else Trunk(_trunk_length(trunk or {}))
        length = source.length
        sections = [Section(chunk, graph, to_trunk=given) for chunk in self.chunks(row, length, max_rows)]
        inputs, positions = embeds_TH, row.position_ids + length
        if source.inputs is not None:
            sections.insert(0, Section(trunk_chunk(length, embeds_TH.device), graph))
            inputs = torch.cat([source.inputs, embeds_TH])
            positions = torch.cat([torch.arange(length, device=positions.device), positions])
        recompute = graph and self.activations.recompute(inputs.shape[0])
        layer_pass = LayerPass(sections, {} if trunk is None else trunk, recompute, given=source.values)
        return row.scores(self.run(layer_pass, inputs, positions))

    def trunk(self, prompt_PH: Tensor, trunk_ids: Tensor | None = None) -> "Trunk":
        """What all rows stand on: a soft prompt and embeddings of `trunk_ids` [I], or a deep prompt's keys and values.

        Raises ValueError for trunk_ids behind a deep prompt: tokens behind it belong to the rows.
        """
        inputs = prompt_PH.to(self.dtype)
        tokens = None if trunk_ids is None or not len(trunk_ids) else trunk_ids
        if self.prompt == "deep":
            if tokens is not None:
                raise ValueError("A deep prompt's trunk holds no tokens; pack the rows with shared=0.")
            return Trunk(inputs.shape[0], values=split_deep(inputs, self.model.config))
        if tokens is not None:
            inputs = torch.cat([inputs, self.embed(tokens)])
        return Trunk(inputs.shape[0], inputs=inputs)

    def shared_start(self, examples: Sequence[Example]) -> int:
        """Tokens of the examples' common start that go into the trunk: none behind a deep prompt."""
        return shared_start(examples) if self.prompt == "soft" else 0

    def cache_trunk(self, prompt_PH: Tensor, trunk_ids: Tensor | None = None) -> TrunkCache:
        """Keys and values of the trunk for every layer, detached: computed once, used by any number of rows.

        trunk_ids: those of the rows (PackedRow.trunk_ids).
        """
        trunk = self.trunk(prompt_PH, trunk_ids)
        if trunk.values is not None:
            return trunk.detached().values or {}
        assert trunk.inputs is not None
        layer_pass = LayerPass([Section(trunk_chunk(trunk.length, trunk.inputs.device), graph=False)], {})
        with torch.no_grad():
            self.run(layer_pass, trunk.inputs, torch.arange(trunk.length, device=trunk.inputs.device))
        return layer_pass.trunk

    def mean_embedding_norm(self, chunk: int = 16384) -> float:
        """Mean l2 norm over the vocabulary's embeddings: the unit of sigma and epsilon."""
        count = self.model.get_input_embeddings().num_embeddings
        total = 0.0
        with self.shards.edges():
            for start in range(0, count, chunk):
                ids = torch.arange(start, min(start + chunk, count), device=self.device)
                total += self.embed(ids).float().norm(dim=-1).sum().item()
        return total / count


@dataclass(frozen=True)
class Trunk:
    """length: its tokens. inputs [length, H]: embeddings that pass through the layers; or values: keys and values of
    every layer, with their graph; neither where they are cached."""

    length: int
    inputs: Tensor | None = None
    values: TrunkCache | None = None

    def detached(self) -> "Trunk":
        """The same without its graph."""
        inputs = self.inputs.detach() if self.inputs is not None else None
        if self.values is None:
            return Trunk(self.length, inputs)
        values = {layer: detached(pairs) for layer, pairs in self.values.items()}
        return Trunk(self.length, inputs, values)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: the members of its longest ModuleList."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def trunk_chunk(length: int, device: torch.device) -> Chunk:
    """The prompt's tokens and those behind it: scored nowhere, attended to by every row."""
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    return Chunk(length, plan_tree((), length, length, device), None, nowhere, is_trunk=True)


def _chunk(row: PackedRow, first: int, last: int, trunk_keys: int) -> Chunk:
    """Blocks `first` to `last` of the row, with a plan of their own."""
    blocks, scored = row.blocks[first:last], row.scored[first:last]
    device = row.token_ids.device
    starts, places = 0, []
    for block, asked in zip(blocks, scored, strict=True):
        places.append(starts + asked)
        starts += block.length
    plan = plan_tree(blocks, 0, trunk_keys, device)
    last_plan = plan_tree(blocks, 0, trunk_keys, device, scored)
    return Chunk(starts, plan, last_plan, torch.from_numpy(np.concatenate(places)).to(device))


def _trunk_length(trunk: TrunkCache) -> int:
    return next(iter(trunk.values()))[0][0].shape[0]


def refusal(model: Any, reason: str) -> str:
    """The sentence that refuses a family by name."""
    family = getattr(model.config, "model_type", type(model).__name__)
    return (
        f"Model family {family!r} ({type(model).__name__}) can't be served: {reason}. Use a causal one that "
        "goes through transformers' AttentionInterface (llama, mistral, qwen2, qwen3, gpt2, gpt_neox, opt, phi, gemma2)"
    )


def max_row_length(config: Any) -> int:
    """Tokens of the longest row (prompt included) on which packed and plain passes agree, from the config alone."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    rope = getattr(text, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in _LONG_ROPE:
        limits.append(rope.get("original_max_position_embeddings"))
    limits.append(getattr(text, "attention_chunk_size", None))  # chunked attention is plain attention below a chunk
    known = [int(limit) for limit in limits if limit]
    return min(known) if known else 1 << 30


@torch.no_grad()
def _plain_scores(model: Any, embed: Callable[[Tensor], Tensor], prompt_PH: Tensor, example: Example) -> Tensor:
    """[C] candidate log-probabilities by one ordinary forward a candidate: the check's reference."""
    scores = []
    for candidate in example.candidate_ids:
        ids = torch.tensor([*example.context_ids, *candidate[:-1]], device=prompt_PH.device)
        inputs = torch.cat([prompt_PH, embed(ids)])[None]
        log_probs = model(inputs_embeds=inputs, use_cache=False).logits[0].float().log_softmax(-1)
        first = prompt_PH.shape[0] + len(example.context_ids) - 1
        scores.append(sum(log_probs[first + place, token] for place, token in enumerate(candidate)))
    return torch.stack(scores)


def check_backbone(backbone: Backbone) -> None:
    """One packed pass against plain ones on two small rows; raises ValueError naming a family that doesn't agree.

    Checks that every layer called the tree attention, that scores agree with the family's own eager attention,
    that the prompt gets a finite non-zero gradient, and that no layer asks for a local window that its attention
    call doesn't name. Measures what kept activations cost (Backbone.activations).
    """
    model = backbone.model
    generator = make_generator(0, "check")
    size = backbone.model.get_input_embeddings().num_embeddings
    draw = torch.randint(0, size, (24,), generator=generator).tolist()
    examples = [
        Example(context_ids=draw[:5], movable=[True] * 5, candidate_ids=[draw[5:8], draw[8:9]], gold=0, index=0),
        Example(context_ids=draw[9:12], movable=[True] * 3, candidate_ids=[draw[12:13]], gold=0, index=1),
    ]
    prompt = backbone.embed(torch.tensor(draw[13:17], device=backbone.device)).detach().clone().requires_grad_()
    row = pack(examples).to(backbone.device)
    with backbone.shards.edges():
        found = _packed_check(backbone, row, prompt)
    expected = backbone.model.config.get_text_config().num_hidden_layers
    if len(found.layers) != expected:
        raise ValueError(refusal(model, f"{len(found.layers)} of its {expected} layers used our attention function"))
    if found.local:
        raise ValueError(
            refusal(model, f"it masks a local window of {min(found.local)} in a way that attention can't see")
        )
    if not bool(torch.isfinite(found.gradient).all()) or not bool(found.gradient.abs().sum() > 0):
        raise ValueError(refusal(model, "the prompt gets no finite, non-zero gradient through it"))
    model.set_attn_implementation("eager")
    try:
        with backbone.shards.edges():
            plain = [_plain_scores(model, backbone.embed, prompt.detach(), example) for example in examples]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    error = max(float((found.scores[i, : len(p)] - p).abs().max()) for i, p in enumerate(plain))
    bound = 1e-3 if backbone.dtype == torch.float32 else 0.5
    if not error <= bound:
        raise ValueError(refusal(model, f"packed scores differ from plain ones by {error:.1e} (allowed: {bound})"))


@dataclass(frozen=True)
class _Found:
    """layers: those whose attention was ours. local: window sizes that their attention call doesn't name."""

    layers: set[int]
    local: set[int]
    scores: Tensor
    gradient: Tensor


def _packed_check(backbone: Backbone, row: PackedRow, prompt: Tensor) -> _Found:
    length = prompt.shape[0]
    sections = [Section(trunk_chunk(length, prompt.device), True)]
    sections += [Section(chunk, True) for chunk in backbone.chunks(row, length)]
    layer_pass = LayerPass(sections, {})
    positions = torch.cat([torch.arange(length, device=prompt.device), row.position_ids + length])
    seen: set[int] = set()
    saved = SavedBytes(backbone.parameters())
    inputs = torch.cat([prompt, backbone.embed(row.token_ids)])
    try:
        with holding(local_sizes, seen), saved.counting():
            logits = backbone.run(layer_pass, inputs, positions)
    except RuntimeError as error:  # a family's own attention, with masks for the whole row
        raise ValueError(
            refusal(backbone.model, f"its layers fail on a packed row ({str(error).splitlines()[0]})")
        ) from None
    backbone.activations = replace(backbone.activations, bytes_per_token=saved.total / inputs.shape[0])
    layers = {number for number, calls in layer_pass.attention_calls.items() if calls}
    scores = row.scores(logits)
    if not layers:  # nothing below would say more than that
        return _Found(layers, set(), scores, prompt)
    (gradient,) = torch.autograd.grad(scores[row.present[None]].sum(), prompt)
    local = {size for size in seen if size not in layer_pass.windows}
    chunk = getattr(backbone.model.config.get_text_config(), "attention_chunk_size", None)
    local.discard(chunk)  # max_row_length keeps rows within one chunk
    return _Found(layers, local, scores[0].detach(), gradient)
