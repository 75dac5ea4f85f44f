"""How many tokens a row may have, and the position id that its first one gets."""

from typing import Any

import torch
from torch import nn

from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan, auto_class, is_encoder

# The positions that a family counts to: most families', older ones', MPT's, LED's encoder's, Whisper's decoder's.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_encoder_position_embeddings",
           "max_target_positions")  # fmt: skip
_LONG_ROPE = {"dynamic", "longrope"}  # rotary frequencies that depend on the longest position of the whole row


def first_position(model: nn.Module) -> int:
    """The position id of a row's first token: roberta's family begins behind its padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def max_row_length(config: Any) -> int:
    """Tokens of the longest row (prompt included) on which packed and plain passes agree, from the config alone."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _LIMITS]
    for rope in _rotary_settings(text):
        if rope.get("rope_type") in _LONG_ROPE:
            limits.append(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
    limits.append(getattr(text, "attention_chunk_size", None))  # chunked attention is plain attention below a chunk
    limits.append(most_counted_tokens(config))
    known = [int(limit) for limit in limits if limit and limit > 0]  # -1: xlnet's, no limit
    return min(known) if known else 1 << 30


def most_counted_tokens(config: Any) -> int | None:
    """Tokens that a layer may handle in one go where it counts them itself, from 0 (llama4's attention temperature)."""
    text = config.get_text_config()
    return text.floor_scale - 1 if getattr(text, "attn_temperature_tuning", False) else None


def _rotary_settings(text: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration, one for each kind of layer where they differ."""
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return nested or [rope]


def window_lengths(config: Any) -> list[int]:
    """Lengths at which a family begins to attend otherwise: rows beyond them are computed in another way."""
    text = config.get_text_config()
    names = ("sliding_window", "sliding_window_size", "attention_window", "local_attention", "window_size",
             "index_topk")  # fmt: skip
    found = [getattr(text, name, None) for name in names]
    flat = [size for one in found for size in (one if isinstance(one, (list, tuple)) else [one])]
    return sorted({int(size) for size in flat if isinstance(size, int) and size > 0})


def checked_length(config: Any, longest: int, limit: int) -> int:
    """Tokens of the longest row, at most `limit`, that a start-up check with rows of `longest` speaks for: none that
    reaches beyond a window which those don't reach."""
    return min([limit, *(window for window in window_lengths(config) if window >= longest)])


def row_room(max_length: int | None, prompt_length: int, config: Any, plan: HeadPlan | None = None) -> int:
    """Tokens of a row behind the prompt; ValueError where the prompt leaves none or --max_length exceeds the model."""
    limit = max_row_length(config)
    if plan is not None and (plan.kind != "causal" or is_encoder(config)):  # roberta's kin have causal heads, too
        with torch.device("meta"):
            limit -= first_position(auto_class(config, plan.kind, "").from_config(config))
    if max_length is not None and not prompt_length < max_length <= limit:
        raise UserError(
            f"--max_length {max_length} must lie between the prompt's {prompt_length} tokens and the backbone's "
            f"context of {limit}."
        )
    room = min(limit, max_length or limit) - prompt_length
    if room < 1:
        raise UserError(f"--prompt_length {prompt_length} leaves no room in the backbone's context of {limit} tokens.")
    return room
