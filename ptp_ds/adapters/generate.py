"""Generation behind a trained prompt by a plain transformers model: greedily, one row at a time, by our own loop, or
with what transformers' generate is given for a batch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ptp_ds.prompts.deep import split_deep
from ptp_ds.tasks.example import Example


@torch.no_grad()
def generate(
    model: Any, prompt_PH: Tensor, kind: str, context_ids: Sequence[int], count: int, stops: Collection[int] = (),
    prompt_at: int = 0,
) -> list[int]:  # fmt: skip
    """At most `count` tokens, each the likeliest; one of `stops` ends them and is left out.

    model: a causal one with eager or sdpa attention. kind: soft, prompt_PH stands before the context's embedding
    prompt_at; or deep, prompt_PH [P, D] fills the cache, so the context starts at position P either way.
    """
    embed = model.get_input_embeddings()
    inputs_TH = embed(torch.tensor(list(context_ids), device=model.device))
    prompt = prompt_PH.to(inputs_TH)
    cache, end = DynamicCache(), 0
    if kind == "deep":
        cache, end = _filled_cache(model, prompt, 1), prompt.shape[0]
    else:
        inputs_TH = torch.cat([inputs_TH[:prompt_at], prompt, inputs_TH[prompt_at:]])
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


def _filled_cache(model: Any, prompt_PD: Tensor, batch: int) -> DynamicCache:
    """A deep prompt as the cache of `batch` rows. Without the configuration: a cache that knows windows would drop what
    lies outside of one, masks hide it.
    """
    cache = DynamicCache()
    for layer, ((keys, values),) in split_deep(prompt_PD, model.config).items():
        keys, values = (part.transpose(0, 1)[None].repeat(batch, 1, 1, 1) for part in (keys, values))
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def token_embeddings(model: Any, prompt_PH: Tensor, example: Example) -> Tensor:
    """[P + T, H] a row's context as the model sees it: its token embeddings with the soft prompt in its place."""
    embed = model.get_input_embeddings()
    rows_TH = embed(torch.tensor(list(example.context_ids), device=model.device))
    return torch.cat([rows_TH[: example.prompt_at], prompt_PH.to(rows_TH), rows_TH[example.prompt_at :]])


@dataclass(frozen=True)
class Inputs:
    """arguments: of model.generate. repeated: tokens that its result repeats before the new ones."""

    arguments: dict[str, Any]
    repeated: int


@torch.no_grad()
def generation_inputs(model: Any, prompt: Tensor, kind: str, examples: Sequence[Example], copies: int = 1) -> Inputs:
    """The rows' contexts as one batch for transformers' generate, padded on the left.

    A soft prompt [P, H] stands among the embeddings; a deep one [P, D] is the cache, behind which P tokens count as
    read. copies: how often generate repeats each row, for beams or samples; it leaves the cache as it is.
    """
    device, most = model.device, max(len(example.context_ids) for example in examples)
    pads = [most - len(example.context_ids) for example in examples]
    if kind == "soft":
        rows = [token_embeddings(model, prompt, example) for example in examples]
        embeds = torch.stack(
            [torch.nn.functional.pad(row, (0, 0, pad, 0)) for row, pad in zip(rows, pads, strict=True)]
        )
        mask = _left_mask(pads, embeds.shape[1], 0, device)
        return Inputs({"inputs_embeds": embeds, "attention_mask": mask}, 0)
    length = prompt.shape[0]
    ids = [[0] * (length + pad) + list(example.context_ids) for example, pad in zip(examples, pads, strict=True)]
    cache = _filled_cache(model, prompt.to(device=device, dtype=model.dtype), len(examples) * copies)
    mask = _left_mask(pads, length + most, length, device)
    arguments = {"input_ids": torch.tensor(ids, device=device), "attention_mask": mask, "past_key_values": cache}
    return Inputs(arguments, length + most)


def _left_mask(pads: Sequence[int], width: int, start: int, device: torch.device) -> Tensor:
    """[B, width] 1 but for each row's padding, which begins at `start`."""
    place = torch.arange(width, device=device)
    return torch.stack([((place < start) | (place >= start + pad)).long() for pad in pads])
