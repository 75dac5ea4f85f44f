"""The frozen language model: packed scoring through transformers' public interfaces, and its start-up check."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptp_ds.attention import ATTENTION_NAME, KeysValues, plan_tree, tree_pass
from ptp_ds.packing import Example, PackedRow, pack
from ptp_ds.seeding import make_generator

TrunkCache = dict[nn.Module, KeysValues]
_LONG_ROPE = {"dynamic", "longrope"}  # rotary frequencies that depend on the longest position of the whole row


class Backbone(nn.Module):
    """A causal transformers model that is never trained, never in train mode, and sees packed rows only.

    model: any *ForCausalLM whose attention goes through AttentionInterface and whose forward takes inputs_embeds,
    position_ids and logits_to_keep. Its files are neither copied nor patched.
    """

    model: Any  # a transformers model; its methods are found at run time

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except (ValueError, ImportError, AttributeError):
            raise ValueError(refusal(model, "it accepts no attention function from outside")) from None

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
        """[T] -> [T, H] frozen token embeddings, no gradient. A module call, so ZeRO-3 gathers and releases them."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(token_ids)

    def score(
        self, row: PackedRow, embeds_TH: Tensor, prompt_PH: Tensor | None = None, trunk: TrunkCache | None = None,
        record: TrunkCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Candidate log-probabilities [S, B, C] of a packed row in one pass.

        Give prompt_PH to compute the trunk in this pass (and `record` to keep its keys and values, with their graph),
        or `trunk`, a cache recorded before, to attend to it without computing it again.
        """
        if (prompt_PH is None) == (trunk is None):
            raise ValueError("score needs either prompt_PH or trunk, one of the two.")
        if trunk is not None:
            length, keys, inputs = 0, _trunk_length(trunk), embeds_TH
            positions = row.position_ids + keys
        else:
            assert prompt_PH is not None
            length = keys = prompt_PH.shape[0]
            inputs = torch.cat([prompt_PH.to(embeds_TH.dtype), embeds_TH])
            trunk_positions = torch.arange(length, device=row.position_ids.device)
            positions = torch.cat([trunk_positions, row.position_ids + length])
        plan = plan_tree(row.blocks, length, keys, embeds_TH.device)
        with tree_pass(plan, trunk, record):
            logits = self._logits(inputs, positions, row.kept + length)
        return row.scores(logits)

    def cache_trunk(self, prompt_PH: Tensor) -> TrunkCache:
        """Keys and values of the prompt for every layer, detached: computed once, used by any number of rows."""
        record: TrunkCache = {}
        length = prompt_PH.shape[0]
        positions = torch.arange(length, device=prompt_PH.device)
        plan = plan_tree((), length, length, prompt_PH.device)
        with torch.no_grad(), tree_pass(plan, None, record):
            self._logits(prompt_PH.to(self.dtype), positions, positions[-1:])
        return record

    def _logits(self, inputs_TH: Tensor, positions_T: Tensor, kept_N: Tensor) -> Tensor:
        out = self.model(
            inputs_embeds=inputs_TH[None], position_ids=positions_T[None], use_cache=False, logits_to_keep=kept_N
        )
        return out.logits[0]

    def mean_embedding_norm(self, chunk: int = 16384) -> float:
        """Mean l2 norm over the vocabulary's embeddings: the unit of sigma and epsilon."""
        count = self.model.get_input_embeddings().num_embeddings
        total = 0.0
        for start in range(0, count, chunk):
            ids = torch.arange(start, min(start + chunk, count), device=self.device)
            total += self.embed(ids).float().norm(dim=-1).sum().item()
        return total / count


def _trunk_length(trunk: Mapping[nn.Module, KeysValues]) -> int:
    return next(iter(trunk.values()))[0].shape[0]


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
    call doesn't name.
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
    calls, local = _packed_check(backbone, row, prompt)
    expected = backbone.model.config.get_text_config().num_hidden_layers
    if calls["attention"] != expected:
        raise ValueError(refusal(model, f"{calls['attention']} of its {expected} layers used our attention function"))
    if local:
        raise ValueError(refusal(model, f"it masks a local window of {min(local)} in a way that attention can't see"))
    gradient = calls["gradient"]
    if not bool(torch.isfinite(gradient).all()) or not bool(gradient.abs().sum() > 0):
        raise ValueError(refusal(model, "the prompt gets no finite, non-zero gradient through it"))
    model.set_attn_implementation("eager")
    try:
        plain = [_plain_scores(model, backbone.embed, prompt.detach(), example) for example in examples]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    packed = calls["scores"]
    error = max(float((packed[i, : len(p)] - p).abs().max()) for i, p in enumerate(plain))
    bound = 1e-3 if backbone.dtype == torch.float32 else 0.5
    if not error <= bound:
        raise ValueError(refusal(model, f"packed scores differ from plain ones by {error:.1e} (allowed: {bound})"))


def _packed_check(backbone: Backbone, row: PackedRow, prompt: Tensor) -> tuple[dict, set[int]]:
    plan = plan_tree(row.blocks, prompt.shape[0], prompt.shape[0], prompt.device)
    positions = torch.cat([torch.arange(prompt.shape[0], device=prompt.device), row.position_ids + prompt.shape[0]])
    with tree_pass(plan) as state:
        inputs = torch.cat([prompt, backbone.embed(row.token_ids)])
        logits = backbone._logits(inputs, positions, row.kept + prompt.shape[0])
    scores = row.scores(logits)
    if state.calls == 0:  # nothing below would say more than that
        return {"attention": 0}, set()
    (gradient,) = torch.autograd.grad(scores[row.present[None]].sum(), prompt)
    local = {size for size in state.local_sizes if size not in state.windows}
    chunk = getattr(backbone.model.config.get_text_config(), "attention_chunk_size", None)
    local.discard(chunk)  # max_row_length keeps rows within one chunk
    return {"attention": state.calls, "gradient": gradient, "scores": scores[0].detach()}, local
