"""Model families that the tests prove, and how each is served: what --list_families prints.

A family that isn't listed may still work: the start-up check decides for every model (ptp_ds.backbone.check).
"""

from dataclasses import dataclass

PATHS = {
    "packed": "one packed row, nothing padded; a causal model's prompt and contexts are computed once",
    "generic": "the family's own forward on padded rows; --prompt soft, ds_configs/zero2.json",
}
_ENCODER = ("masked", "classes")


@dataclass(frozen=True)
class Family:
    """A transformers model_type. heads: see ptp_ds.models.heads. path: see PATHS. prompts: those that work."""

    name: str
    heads: tuple[str, ...]
    path: str
    prompts: tuple[str, ...]


def _families(names: str, heads: tuple[str, ...], path: str) -> list[Family]:
    prompts = ("soft", "deep") if path == "packed" else ("soft",)
    return [Family(name, heads, path, prompts) for name in names.split()]


FAMILIES = (
    *_families("llama mistral qwen2 qwen3 gpt2 gpt_neox opt phi gemma2", ("causal",), "packed"),
    *_families("bert roberta xlm-roberta electra albert modernbert distilbert", _ENCODER, "packed"),
    *_families("deberta-v2 mpnet", _ENCODER, "generic"),
    *_families("falcon bloom", ("causal",), "generic"),
    *_families("t5 bart", ("seq2seq",), "generic"),
)


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
