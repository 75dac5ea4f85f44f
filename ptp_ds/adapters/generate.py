"""Greedy generation behind a trained prompt, by a plain transformers model and its own cache, one row at a time."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ptp_ds.prompts.deep import split_deep


@torch.no_grad()
def generate(
    model: Any, prompt_PH: Tensor, kind: str, context_ids: Sequence[int], count: int, stops: Collection[int] = ()
) -> list[int]:
    """At most `count` tokens, each the likeliest; one of `stops` ends them and is left out.

    model: a causal one with eager or sdpa attention. kind: soft, prompt_PH stands in front of the context's embeddings;
    or deep, prompt_PH [P, D] fills the cache, so the context starts at position P either way.
    """
    embed = model.get_input_embeddings()
    inputs_TH = embed(torch.tensor(list(context_ids), device=model.device))
    prompt = prompt_PH.to(inputs_TH)
    cache, end = DynamicCache(), 0  # without the configuration: it keeps what lies outside of a window, masks hide it
    if kind == "deep":
        end = prompt.shape[0]
        for layer, ((keys, values),) in split_deep(prompt, model.config).items():
            cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    else:
        inputs_TH = torch.cat([prompt, inputs_TH])
    found: list[int] = []
    while len(found) < count:
        start, end = end, end + inputs_TH.shape[0]
        out = model(
            inputs_embeds=inputs_TH[None], past_key_values=cache, use_cache=True, logits_to_keep=1,
            position_ids=torch.arange(start, end, device=model.device)[None],
            attention_mask=torch.ones(1, end, dtype=torch.int64, device=model.device),
        )  # fmt: skip
        token = out.logits[0, -1].argmax()
        if int(token) in stops:
            break
        found.append(int(token))
        inputs_TH = embed(token[None])
    return found


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's configurations (some name several)."""
    named = [tokenizer.eos_token_id, model.config.get_text_config().eos_token_id, model.generation_config.eos_token_id]
    return {token for ids in named if ids is not None for token in ([ids] if isinstance(ids, int) else ids)}
