"""Plain references and small models: everything here uses transformers as anyone would, one row at a time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_LLAMA_LIKE = {
    **_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_GPT2 = {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_PLAIN = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
# Soft caps and windows are set so that dropping them would be far above rounding.
FAMILIES = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 6},
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "gpt2": _GPT2,
    "gpt_neox": _PLAIN,
    "opt": {**_COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 256, "word_embed_proj_dim": 32},
    "phi": {**_LLAMA_LIKE, "num_key_value_heads": 4},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 0.5,
               "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
}  # fmt: skip
REFUSED = {
    "falcon": {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {**_COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def make_model(family: str, dtype: torch.dtype = torch.float32, deviation: float = 0.2) -> torch.nn.Module:
    """A tiny random model of a family; weights large enough that attention is far from uniform."""
    torch.manual_seed(11)
    config = AutoConfig.for_model(family, **{**FAMILIES, **REFUSED}[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, deviation)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def make_examples(shape: str, seed: int = 0) -> list[Example]:
    """Rows of uneven length. shape: single (1-token answers), multi (1 to 3 tokens), ragged (2 or 3 answers)."""
    generator = make_generator(seed, "examples")

    def draw(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    answers = {"single": [(1, 1)] * 5, "multi": [(2, 3), (1, 3), (3, 1), (2, 2), (1, 1)],
               "ragged": [(2, 1, 3), (1, 1), (3, 2, 1), (2, 2), (1, 3)]}[shape]  # fmt: skip
    examples = []
    for number, (length, sizes) in enumerate(zip((4, 9, 1, 13, 7), answers, strict=True)):
        movable = [place % 3 != 0 for place in range(length)]
        context, candidates = draw(length), [draw(size) for size in sizes]
        examples.append(
            Example(context_ids=context, movable=movable, candidate_ids=candidates, gold=len(sizes) - 1, index=number)
        )
    return examples


def with_instruction(examples):
    """The examples behind three tokens that all of them begin with."""
    return [replace(e, context_ids=[7, 8, 9, *e.context_ids], movable=[False] * 3 + list(e.movable)) for e in examples]


def plain_scores(model: torch.nn.Module, prompt_PH: Tensor, example: Example, delta_LH: Tensor | None = None) -> Tensor:
    """[C] log-probability of each candidate: an ordinary forward a candidate, full logits, eager attention."""

    def forward(rows_LH: Tensor) -> Tensor:
        inputs = torch.cat([prompt_PH, rows_LH])[None]
        return model(inputs_embeds=inputs, use_cache=False).logits[0, prompt_PH.shape[0] :]

    return candidate_scores(model, forward, example, delta_LH)


def candidate_scores(
    model: torch.nn.Module, forward: Callable[[Tensor], Tensor], example: Example, delta_LH: Tensor | None = None
) -> Tensor:
    """[C] log-probabilities where `forward` maps the embeddings of a context and one candidate to their logits."""
    embed = model.get_input_embeddings()
    context = embed(torch.tensor(list(example.context_ids)))
    if delta_LH is not None:
        context = context + delta_LH
    scores = []
    for candidate in example.candidate_ids:
        log_probs = forward(torch.cat([context, embed(torch.tensor(list(candidate)))])).log_softmax(-1)
        first = len(example.context_ids) - 1
        scores.append(torch.stack([log_probs[first + place, token] for place, token in enumerate(candidate)]).sum())
    return torch.stack(scores)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in l2."""
    return float((actual - expected).norm() / expected.norm())
