"""Deep prompts: P trained keys and values in every layer (prefix tuning, Li and Liang 2021; P-tuning v2, Liu 2022).

One tensor [P, D], D = 2 L K d: for each token layer by layer the keys, then the values, head by head, as peft's
PREFIX_TUNING lays them out. Keys are those that attention sees, behind the rotary positions 0 to P - 1.
"""

from typing import Any

import torch
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.prompts.soft import SoftPrompt

KeysValues = tuple[Tensor, Tensor]


class DeepPrompt(SoftPrompt):
    """weight [P, D] fp32."""


def deep_shape(config: Any) -> tuple[int, int, int]:
    """(layers L, key heads K, width d of a head) of a model's configuration."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, heads, width


def deep_width(config: Any) -> int:
    """D: numbers of a deep prompt's token."""
    layers, heads, width = deep_shape(config)
    return 2 * layers * heads * width


def split_deep(prompt_PD: Tensor, config: Any) -> dict[int, list[KeysValues]]:
    """layer -> [(keys [P, K, d], values [P, K, d])], views of the prompt."""
    layers, heads, width = deep_shape(config)
    if prompt_PD.shape[1] != 2 * layers * heads * width:
        raise UserError(f"A deep prompt of width {prompt_PD.shape[1]} doesn't fit this model's {deep_width(config)}.")
    parts = prompt_PD.view(prompt_PD.shape[0], layers, 2, heads, width).unbind(1)
    return {layer: [(part[:, 0], part[:, 1])] for layer, part in enumerate(parts)}


def join_deep(prefix: dict[int, list[KeysValues]], config: Any) -> Tensor:
    """[P, D] from every layer's keys and values: a soft prompt's own are where a deep one starts.

    Raises ValueError for a family whose layers don't all have one attention call, its keys and values of the shape that
    the configuration names (latent attention's differ).
    """
    layers, heads, width = deep_shape(config)
    shapes = {tuple(x.shape[1:]) for pairs in prefix.values() for pair in pairs for x in pair}
    if shapes != {(heads, width)} or len(prefix) != layers or any(len(pairs) != 1 for pairs in prefix.values()):
        raise UserError(
            f"A deep prompt needs one attention call in each of the {layers} layers, with keys and values of {heads} "
            f"heads x {width}; this model has {sorted(shapes)} in {len(prefix)}: use --prompt soft."
        )
    stacked = torch.stack([torch.stack(prefix[layer][0], dim=1) for layer in sorted(prefix)], dim=1)  # [P, L, 2, K, d]
    return stacked.flatten(1).float()
