"""The model card beside an adapter: README.md, as the hub shows it, from what ptp_ds.json says."""

from collections.abc import Mapping
from typing import Any

_SETTINGS = ("perturbation", "prompt", "seed", "steps", "best_step", "world_size")


def untrained_metrics(result: Any) -> dict[str, float]:
    """The untrained prompt's metrics on a result.json; {} where it has none. Older ones hold them a level deeper."""
    held = result.get("untrained") if isinstance(result, dict) else None
    found = held.get("metrics", held) if isinstance(held, dict) else None
    numbers = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in numbers if isinstance(value, float)}


def model_card(base_model: str, card: Mapping[str, Any]) -> str:
    """Markdown with task, scores, seed and versions; what `card` doesn't say is left out."""
    task, result = card.get("task") or {}, card.get("result") or {}
    versions = card.get("versions") or {}
    lines = ["---", f"base_model: {base_model}", "library_name: peft", "tags: [prompt-tuning, ptp]", "---", ""]
    lines += [f"# A prompt for {task.get('name', 'a task of its own')}", ""]
    lines += [
        "Trained with ptp_ds; the backbone is frozen. `adapter_model.safetensors` holds all that was trained.",
        "",
    ]
    metrics = result.get("metrics") or {}
    if metrics:
        split, rows = result.get("eval_split", "?"), result.get("eval_examples", "?")
        lines += [f"| metric, {split} ({rows} rows) | score |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
        for name, value in untrained_metrics(result).items():
            lines.append(f"| {name} of the untrained prompt | {value:.4f} |")
        if "majority" in result:
            lines.append(f"| accuracy of the majority class | {result['majority']:.4f} |")
        lines.append("")
    settings = [f"{name} {result[name]}" for name in _SETTINGS if name in result]
    if settings:
        lines += [f"One run: {', '.join(settings)}. Scores differ between seeds; compare means over several.", ""]
    if task.get("text"):
        lines += ["Text of a row:", "", *(f"    {line}" for line in str(task["text"]).split("\n")), ""]
    known = [f"{name} {version}" for name, version in versions.items() if version]
    if known:
        lines += [f"Versions: {', '.join(known)}.", ""]
    return "\n".join(lines)
