"""Tiny random models of every family that the installed transformers has, for family_sweep.py.

A family's own configuration is shrunk by the names of its settings; what that can't know stands in EXCEPTIONS. Windows,
attention chunks and original rope lengths are short, so that rows of a few dozen tokens go beyond them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}  # fmt: skip
WIDTH, LAYERS, HEADS, HEAD_WIDTH, VOCABULARY, LONGEST = 32, 2, 4, 8, 120, 128
WINDOW, ROPE_LENGTH, LABELS = 8, 16, 3
MASK, END = 4, 2  # the tokens that hide an answer and end a text
FIRST_TOKEN = 24  # below it are special tokens
WEIGHTS = {"large": 0.2, "small": 0.02}  # deviations: large ones make every part matter, small ones hide much
_MOST_PARAMETERS = 5_000_000
_LEARNED = ("bias", "scalar", "beta")  # in the names of buffers that training has set

# The small value of settings by their names.
_VALUES: list[tuple[Any, str]] = [
    (WIDTH, """hidden_size d_model n_embd dim emb_dim word_embed_proj_dim pooler_hidden_size d_latents embedding_dim
        lru_width backbone_hidden_size prediction_head_size output_dim true_hidden_size adapter_in_dim
        adapter_out_dim adapter_input_size audio_hidden_size out_hidden_size"""),
    (24, "embedding_size input_embedding_size"),
    (40, "output_embedding_size"),
    (48, """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff hidden_dim
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        ffn_hidden_size intermediate_size_mlp dense_intermediate_size moe_shared_expert_intermediate_size
        feed_forward_size shared_experts_intermediate_size"""),
    (LAYERS, """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers num_blocks depth
        num_mem_blocks num_self_attends_per_block"""),
    (HEADS, """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads num_cross_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads attention_heads
        swa_num_attention_heads linear_num_heads num_query_groups"""),
    (2, """num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads index_n_heads n_group
        topk_group num_expert_group num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts
        mamba_n_groups mamba_ngroups n_groups no_rope_layer_interval interleave_moe_layer_step"""),
    (1, """first_k_dense_replace num_dense_layers num_shared_experts n_shared_experts moe_num_shared_experts
        num_kv_shared_layers num_nextn_predict_layers num_conv_pos_embedding_groups moe_layer_start_index"""),
    (HEAD_WIDTH, """head_dim d_kv d_head v_head_dim qk_nope_head_dim swa_head_dim kv_channels dim_head
        linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim attention_head_size mamba_d_head
        mamba_head_dim mamba_headdim query_pre_attn_scalar mamba_d_state ssm_state_size state_size laurel_rank
        mamba_n_heads mamba_num_heads sliding_window sliding_window_size attention_window attention_window_size
        local_attention window_size local_attention_window_len hidden_size_per_layer_input hash_code_len num_hash"""),
    (4, """qk_rope_head_dim rotary_dim global_block_size num_global_tokens num_experts num_local_experts
        n_routed_experts moe_num_experts linear_num_value_heads zero_expert_num intra_bottleneck_size
        gated_norm_rank relative_attention_num_buckets time_step_rank mamba_dt_rank hc_lowrank adapter_rank
        index_topk d_rel"""),
    (7, "local_radius"),
    (16, """kv_lora_rank q_lora_rank o_lora_rank pronunciation_embed_dim shape_embed_dim entity_emb_size
        prompt_mid_dim attention_chunk_size floor_scale original_max_position_embeddings embedding_rank
        router_hidden_size num_buckets rel_extent log_scaling_n_floor chunk_size mamba_chunk_size
        relative_attention_max_distance max_relative_positions position_bias_num_buckets position_bias_max_distance"""),
    (VOCABULARY, """vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input
        t2u_vocab_size char_vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size
        unit_hifi_gan_vocab_size unpadded_vocab_size"""),
    (LONGEST, """max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length
        max_encoder_position_embeddings max_decoder_position_embeddings max_source_positions max_target_positions
        t2u_max_position_embeddings"""),
    (2.0, "embedding_multiplier logits_scaling embedding_scale scale_emb attn_logit_softcapping"),
    (0.5, "residual_multiplier attention_multiplier key_multiplier attention_out_multiplier attention_in_multiplier"),
    (5.0, "final_logit_softcapping logits_soft_cap"),
    (True, "scale_embedding use_sliding_window mup_enabled token_dropout"),
]  # fmt: skip
SMALL: dict[str, Any] = {name: value for value, names in _VALUES for name in names.split()}
_IF_NONE = {
    "sliding_window",
    "vocab_size",
    "head_dim",
    "num_key_value_heads",
}  # set also where the family's own default is none
_PATTERNS = {"layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types"}
DERIVED = object()  # in the place of a value: the configuration's own
_TOKENS = {"pad": 1, "bos": 0, "eos": END, "mask": MASK, "sep": 3, "cls": 0, "decoder_start": END, "unk": 5}

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 6.0],
    "original_max_position_embeddings": ROPE_LENGTH, "factor": LONGEST / ROPE_LENGTH,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": LONGEST / ROPE_LENGTH, "mscale": 0.7, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": ROPE_LENGTH,
}  # fmt: skip
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# Settings that the names don't tell; a name with a "+" is one more model of the family before it.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "big_bird+full": {"attention_type": "original_full"},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus+full": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 60},
    "blt_local_encoder": {"hidden_size_global": WIDTH},
    "blt_local_decoder": {"hidden_size_global": WIDTH},
    "cohere+qk_norm": {"use_qk_norm": True},
    "cohere_compass_text": {"layer_types": _SLIDING, "num_hidden_layers": 3,
                            "rope_parameters": dict.fromkeys(_SLIDING, _PLAIN_ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
             "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3+yarn": {"rope_parameters": _YARN},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {f"swa_{name}": value for name, value in (
        ("num_attention_heads", 4), ("num_key_value_heads", 4), ("q_lora_rank", 16), ("kv_lora_rank", 16),
        ("head_dim", 12), ("qk_nope_head_dim", 8), ("v_head_dim", 8))},
    "esm": {"pad_token_id": 1, "mask_token_id": MASK},
    "esm+rotary": {"position_embedding_type": "rotary", "emb_layer_norm_before": False},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon+alibi": {"alibi": True},
    "falcon+grouped": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 64, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.8], "mlp_multipliers": [0.5, 1.5]},
    "gemma3_text+longrope": {"rope_parameters": {"full_attention": _LONG_ROPE, "sliding_attention": _PLAIN_ROPE}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt2+scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode+heads": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _LINEAR, "num_hidden_layers": 3},
    "granitemoehybrid+rope": {"position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "llama+dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0,
                                          "original_max_position_embeddings": ROPE_LENGTH}},
    "llama+yarn": {"rope_parameters": {**_YARN, "mscale": None, "mscale_all_dim": None}},
    "llama4_text": {"floor_scale": 24},
    "longt5+global": {"encoder_attention_type": "transient-global"},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"num_feedforward_networks": 2, "intra_bottleneck_size": 16, "true_hidden_size": DERIVED},
    "mobilebert+plain": {"trigram_input": False},
    "modernbert+longrope": {"rope_parameters": {"full_attention": _LONG_ROPE, "sliding_attention": _PLAIN_ROPE}},
    "mpnet": {"relative_attention_num_buckets": 32},
    "neomme": {"head_dim": 16, "per_layer_config": {1: {"sliding_window": None}, 2: {"sliding_window": 12}}},
    "olmo+clip": {"clip_qkv": 1.0},
    "opt+post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "phi+qk_norm": {"qk_layernorm": True},
    "phimoe": {"sliding_window": None},
    "phimoe+window": {"sliding_window": WINDOW},
    "phi3+longrope": {"rope_parameters": _LONG_ROPE},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen2_moe+window": {"use_sliding_window": True, "layer_types": _SLIDING, "num_hidden_layers": 3},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_shape": [16, 8], "axial_pos_embds_dim": [8, 24], "local_attn_chunk_length": 8,
                 "lsh_attn_chunk_length": 8, "attn_layers": ["local", "lsh", "local"], "num_hidden_layers": DERIVED,
                 "num_buckets": DERIVED},
    "reformer+local": {"attn_layers": ["local", "local"]},
    "squeezebert": {"embedding_size": WIDTH},
    "stablelm+qk_norm": {"qk_layernorm": True},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1, 1], "downsampling_ratios": [2]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": DERIVED},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def families(kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, kind) of all models of these kinds; classes: encoders that have a masked model as well."""
    for kind in kinds:
        known = AUTO[kind]._model_mapping
        for name in sorted({*CONFIG_MAPPING.keys(), *(name for name in EXCEPTIONS if "+" in name)}):
            family = name.split("+")[0]
            if _has(family, known) and (kind != "classes" or _has(family, AUTO["masked"]._model_mapping)):
                yield name, kind


def _has(name: str, known: Mapping[Any, Any]) -> bool:
    """Whether a model_type is among an auto class' families."""
    return name in CONFIG_MAPPING and CONFIG_MAPPING[name] in known


def make_config(name: str, kind: str) -> PreTrainedConfig:
    """The shrunk configuration of a model."""
    family = name.split("+")[0]
    changes = {**EXCEPTIONS.get(family, {}), **EXCEPTIONS.get(name, {})}
    config = _small(CONFIG_MAPPING[family], changes)
    for name in ("is_decoder", "causal"):
        if kind == "causal" and hasattr(config, name):
            setattr(config, name, True)
    if kind == "classes":
        config.num_labels = LABELS
    if kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = END
    return config


def _small(family: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A family's configuration with small values in the place of its own."""
    default = family()
    own = default.to_dict() | {n: value for n, value in vars(default).items() if isinstance(value, PreTrainedConfig)}
    values = {name: SMALL[name] for name, value in own.items() if name in SMALL and _replaces(name, value)}
    values |= _layers(own)
    values |= _special_tokens(own)
    if rope := _short_rope(own.get("rope_parameters")):
        values["rope_parameters"] = rope
    if "qk_rope_head_dim" in own:  # as many keys as queries
        values |= {"num_key_value_heads": HEADS, "head_dim": SMALL["qk_rope_head_dim"]}
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _small(type(value), EXCEPTIONS.get(value.model_type, {}))
    values |= changes
    return family(**{name: value for name, value in values.items() if value is not DERIVED})


def _replaces(name: str, value: Any) -> bool:
    return isinstance(value, (int, float, list)) or name in _IF_NONE


def _layers(own: Mapping[str, Any]) -> dict[str, Any]:
    """Each kind of layer that a family mixes, and the first kind once more behind them; how many layers that makes."""
    patterns = {
        name: list(dict.fromkeys(value))
        for name, value in own.items()
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], str) and name in _PATTERNS
    }
    count = max((len(kinds) + 1 if len(kinds) > 1 else LAYERS for kinds in patterns.values()), default=LAYERS)
    found: dict[str, Any] = {name: [kinds[n % len(kinds)] for n in range(count)] for name, kinds in patterns.items()}
    if patterns and "num_hidden_layers" in own:
        found["num_hidden_layers"] = count
    return found


def _special_tokens(own: Mapping[str, Any]) -> dict[str, int]:
    """Token ids below FIRST_TOKEN for every name that ends as a token's does."""
    found, spare = {}, 6
    for name, value in own.items():
        if not name.endswith(("_token_id", "_token_index")) or value is None:
            continue
        known = _TOKENS.get(name.rsplit("_token", 1)[0])
        found[name] = spare if known is None else known
        spare += known is None
    return found


def _short_rope(rope: Any) -> dict[str, Any]:
    """Rotary settings whose original length is short; empty where the family's own have none."""
    if not isinstance(rope, dict) or "original_max_position_embeddings" not in str(rope):
        return {}
    short = copy.deepcopy(rope)
    for part in [short, *(value for value in short.values() if isinstance(value, dict))]:
        if "original_max_position_embeddings" in part:
            part |= {"original_max_position_embeddings": ROPE_LENGTH, "factor": LONGEST / ROPE_LENGTH}
    return short


@dataclass(frozen=True)
class Recipe:
    """What makes a model. weights: a name in WEIGHTS. sharded: whether it is tried on two ranks, too."""

    config: PreTrainedConfig
    kind: str
    weights: str = "large"
    dtype: torch.dtype = torch.float32
    sharded: bool = False


def make_model(recipe: Recipe, eager: bool) -> Any:
    """The same random model whenever it is asked for; eager: with the family's plainest attention."""
    config, kind = recipe.config, recipe.kind
    with torch.device("meta"):
        count = sum(p.numel() for p in AUTO[kind].from_config(copy.deepcopy(config)).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"the shrunk configuration still has {count} parameters")
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    wishes: list[dict[str, str]] = [plain, {}] if eager else [{}]
    if recipe.dtype == torch.float64 and not eager:  # experts' usual products are for other precisions
        wishes.insert(0, {"experts_implementation": "eager"})
    torch.manual_seed(0)
    for wish in wishes:
        try:
            model = AUTO[kind].from_config(copy.deepcopy(config), **wish)
            break
        except (ValueError, TypeError):
            if wish is wishes[-1]:
                raise
    model = model.float().eval().requires_grad_(False)
    fill(model, WEIGHTS[recipe.weights])
    return model.to(recipe.dtype)


@torch.no_grad()
def fill(model: nn.Module, deviation: float) -> None:
    """Random weights, biases and stored buffers, all in one order; norms are about 1."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, generator=generator)

    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last == "bias":
            parameter.copy_(noise(parameter, 1.5 * deviation))
        elif "weight" in last and (parameter.dim() < 2 or "norm" in name.lower()):
            parameter.copy_(1 + noise(parameter, 0.3))
        elif parameter.dim() < 2 or last == "A_log":
            parameter.copy_(parameter.nan_to_num() + noise(parameter, 1.5 * deviation))
        else:
            parameter.copy_(noise(parameter, deviation))
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and any(word in name for word in _LEARNED):
            buffer.add_(noise(buffer, 0.3))
