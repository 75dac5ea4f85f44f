"""Model families that the tests prove, and how each is served: what --list_families prints.

A family that isn't listed may still work: the start-up check decides for every model (ptp_ds.backbone.check).
"""

from dataclasses import dataclass

PATHS = {
    "packed": "one packed row, nothing padded; a causal model's prompt and contexts are computed once",
    "generic": "the family's own forward on padded rows; --prompt soft, ds_configs/zero2.json",
}
_CAUSAL, _ENCODER, _SEQ2SEQ = ("causal",), ("masked", "classes"), ("seq2seq",)
_SOFT, _BOTH = ("soft",), ("soft", "deep")


@dataclass(frozen=True)
class Family:
    """A transformers model_type. heads: see ptp_ds.models.heads. path: see PATHS. prompts: those that work."""

    name: str
    heads: tuple[str, ...]
    path: str
    prompts: tuple[str, ...]


def _families(path: str, heads: tuple[str, ...], prompts: tuple[str, ...], names: str) -> list[Family]:
    return [Family(name, heads, path, prompts) for name in names.split()]


# Held against all families of transformers by tests/backbone/test_every_family.py.
FAMILIES = (
    *_families(
        "packed", _CAUSAL, _BOTH,
        """llama mistral qwen2 qwen3 gpt2 gpt_neox opt phi gemma2 bert roberta xlm-roberta electra apertus arcee
        aria_text bert-generation biogpt bitnet camembert cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm
        data2vec-text dbrx dots1 emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma
        gemma3 gemma3_text glm glm4 glm4_moe gpt-sw3 gpt_oss granite granite_swa granitemoe granitemoe_swa
        granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2
        kolibri1 laguna llama4 llama4_text mellum minimax_m2 minimax_m3_vl_text ministral ministral3 mixtral
        modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi3 phi4_multimodal phimoe
        qwen2_moe qwen3_moe roberta-prelayernorm roc_bert seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
        xlm-roberta-xl xmod""",
    ),
    *_families(
        "packed", _CAUSAL, _SOFT,
        """axk1 deepseek_v2 deepseek_v3 glm4_moe_lite gpt_bigcode mimo_v2_flash minicpm3 youtu""",
    ),
    *_families(
        "packed", _ENCODER, _BOTH,
        "bert roberta xlm-roberta electra albert modernbert distilbert",
    ),
    *_families(
        "packed", _ENCODER, _SOFT,
        """camembert data2vec-text ernie gte jina_embeddings_v3 modernvbert nomic_bert roberta-prelayernorm roc_bert
        ultrabert ultravbert xlm-roberta-xl xmod""",
    ),
    *_families("packed", ("masked",), _SOFT, "eurobert"),
    *_families(
        "generic", _CAUSAL, _SOFT,
        """afmoe bailing_hybrid bamba bart beam bigbird_pegasus blenderbot blenderbot-small bloom codegen diffllama
        doge falcon falcon_mamba gemma4_unified gemma4_unified_text got_ocr2 gpt_neo gpt_neox_japanese gptj
        granitemoehybrid hrm_text inkling2_text inkling_text jamba jetmoe kimi_linear lfm2 lfm2_moe lfm3
        longcat_flash mamba mamba2 marian mbart megatron-bert minimax moss_transcribe_diarize mpt nemotron_h
        olmo_hybrid openai-gpt pegasus plbart qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
        recurrent_gemma rembert roformer rwkv trocr whisper xglm xlm xlstm zamba zamba2 zaya""",
    ),
    *_families(
        "generic", _ENCODER, _SOFT,
        """deberta deberta-v2 flaubert layoutlm luke megatron-bert mobilebert mpnet rembert roformer squeezebert tapas
        xlm""",
    ),
    *_families("generic", ("masked",), _SOFT, "longformer"),
    *_families("generic", ("classes",), _SOFT, "eurobert mra"),
    *_families(
        "generic", _SEQ2SEQ, _SOFT,
        """bart blenderbot led longt5 m2m_100 mbart mt5 nllb-moe pegasus_x plbart seamless_m4t seamless_m4t_v2
        switch_transformers t5 t5gemma t5gemma2 umt5""",
    ),
)  # fmt: skip


def families_table() -> list[str]:
    """Lines of a Markdown table, families that are served alike in one row."""
    rows: dict[tuple, list[str]] = {}
    for family in FAMILIES:
        rows.setdefault((family.path, family.heads, family.prompts), []).append(family.name)
    lines = ["| families | `--head` | `--prompt` | path |", "|---|---|---|---|"]
    for (path, heads, prompts), names in rows.items():
        lines.append(f"| {', '.join(names)} | {', '.join(heads)} | {', '.join(prompts)} | {path} |")
    return lines


def describe_families() -> str:
    """The table and what its paths mean."""
    return "\n".join([*families_table(), "", *(f"{name}: {meaning}" for name, meaning in PATHS.items())])
