"""The model card beside an adapter: README.md, as the hub shows it, from what ptp_ds.json says.

It names no folder of the machine that wrote it, so that it can be pushed as it is.
"""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ptp_ds.adapters.hub import hub_model, is_hub_id
from ptp_ds.adapters.peft_format import IN_LAYERS_TYPE, peft_type
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.tasks.template import PROMPT_MARK

OWN_ID = "OWNER/NAME"  # the adapter's own name on the hub, until it is pushed
_SETTINGS = ("perturbation", "prompt", "seed", "steps", "best_step", "world_size")
_TRAINED_WITH = ("prompt_length", "max_steps", "batch_size", "lr", "reg_weight", "divergence")
_PIPELINE = {"causal": "text-generation", "masked": "fill-mask", "classes": "text-classification",
             "seq2seq": "text2text-generation"}  # fmt: skip
_AUTO_CLASS = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM",
               "classes": "AutoModelForSequenceClassification"}  # fmt: skip
_METRIC_TYPE = {"macro_f1": "f1", "f1a": "f1", "em": "exact_match", "matthews": "matthews_correlation"}  # the hub's


def untrained_metrics(result: Any) -> dict[str, float]:
    """The untrained prompt's metrics on a result.json; {} where it has none. Older ones hold them a level deeper."""
    held = result.get("untrained") if isinstance(result, dict) else None
    return _numbers(held.get("metrics", held) if isinstance(held, dict) else None)


def _numbers(found: Any) -> dict[str, float]:
    items = found.items() if isinstance(found, dict) else ()
    return {str(name): value for name, value in items if isinstance(value, float) and math.isfinite(value)}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def model_card(base_model: str | None, card: Mapping[str, Any]) -> str:
    """README.md: metadata for the hub, then Markdown; what `card` doesn't say is left out, and so is a licence, the
    owner's to choose. base_model: as adapter_config.json has it; a folder is not named.
    """
    parts = [_heading(base_model, card), _scores(card), _usage(base_model, card), _trained_on(card), _versions(card)]
    body = "\n".join(line for part in parts if part for line in [*part, ""])
    return str(ModelCard(f"---\n{card_data(base_model, card).to_yaml()}\n---\n\n{body}"))


def card_data(base_model: str | None, card: Mapping[str, Any]) -> ModelCardData:
    """What the hub reads of the card: model, task, tags, scores (an EvalResult a metric)."""
    task, result = card.get("task") or {}, card.get("result") or {}
    named, dataset = _text(task.get("name")), _hub_dataset(card)
    chooses = any("{" in str(answer) for answer in (task.get("answers") or {}).values())
    results = [
        EvalResult(
            task_type="multiple-choice" if chooses else "text-classification", task_name=named,
            dataset_type=dataset or str(named), dataset_name=str(named), dataset_split=_text(result.get("eval_split")),
            dataset_config=str(named).lower() if dataset else None,
            metric_type=_METRIC_TYPE.get(name, name), metric_name=name, metric_value=value,
        )
        for name, value in _numbers(result.get("metrics")).items()
    ]  # fmt: skip
    kinds = [_text(result.get("prompt")), _text(result.get("perturbation"))]
    return ModelCardData(
        base_model=hub_model(base_model, card), library_name="peft", pipeline_tag=_PIPELINE.get(_head(card)),
        tags=["prompt-tuning", "ptp", "ptp_ds", *(f"ptp-{kind}" for kind in kinds if kind)],
        datasets=[dataset] if dataset else None, model_name=_title(card) if results else None,
        eval_results=results or None,
    )  # fmt: skip


def _hub_dataset(card: Mapping[str, Any]) -> str | None:
    said = (card.get("data") or {}).get("dataset")
    return said if is_hub_id(said) else None


def _head(card: Mapping[str, Any]) -> str:
    return str((card.get("head") or {}).get("kind") or "causal")


def _title(card: Mapping[str, Any]) -> str:
    return f"A prompt for {(card.get('task') or {}).get('name', 'a task of its own')}"


def _heading(base_model: str | None, card: Mapping[str, Any]) -> list[str]:
    hub = hub_model(base_model, card)
    frozen = f"[{hub}](/{hub})" if hub else "its model"
    lines = [
        f"# {_title(card)}",
        "",
        f"Trained with ptp_ds in front of {frozen}, which stays frozen: prompt tuning with perturbation-based "
        "regularisers (PTP, Chen et al., EMNLP 2023). `adapter_model.safetensors` holds all that was trained.",
    ]
    if (card.get("model") or {}).get("name") == EMBEDDED_MODEL:
        lines += [
            "",
            f"It was trained on the Q4_1-quantised weights of that model that ptp_ds calls `{EMBEDDED_MODEL}`, made "
            "floating point again. On the hub's own weights its scores differ a little; `ptp_ds` takes those that it "
            "was trained on.",
        ]
    elif hub is None:
        lines += ["", "The model is a folder that has no name on the hub; give it yourself, as below."]
    return lines


def _scores(card: Mapping[str, Any]) -> list[str]:
    result = card.get("result") or {}
    metrics, lines = _numbers(result.get("metrics")), []
    if metrics:
        split, rows = result.get("eval_split", "?"), result.get("eval_examples", "?")
        lines += ["## Scores", "", f"| metric, {split} ({rows} rows) | score |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
        lines += [f"| {n} of the untrained prompt | {value:.4f} |" for n, value in untrained_metrics(result).items()]
        if majority := _numbers({"": result.get("majority")}):
            lines.append(f"| accuracy of the majority class | {majority['']:.4f} |")
        lines.append("")
    settings = [f"{name} {result[name]}" for name in _SETTINGS if name in result]
    if settings:
        lines += [
            f"One run: {', '.join(settings)}. Scores differ between seeds, often by more than between methods; compare "
            "means over several."
        ]
    return lines


def _usage(base_model: str | None, card: Mapping[str, Any]) -> list[str]:
    task = card.get("task") or {}
    hub, text = hub_model(base_model, card), _text(task.get("text"))
    model = "" if hub else " --model MODEL"
    keyword = "" if hub else ', model="MODEL"'
    lines = [
        "## How to use it",
        "",
        "With ptp_ds, which also takes the text, the answers and the model from here (rows: JSON lines, or CSV or TSV "
        "with a header, with the fields in braces below):",
        "",
        f"    ptp predict --adapter {OWN_ID}{model} --input rows.jsonl",
        f"    ptp evaluate --adapter {OWN_ID}{model} --data_dir DATA",
        "",
        "or in Python:",
        "",
        "    import ptp_ds",
        f'    predictor = ptp_ds.Predictor.from_pretrained("{OWN_ID}"{keyword})',
        "    answers = predictor.predict(rows)  # a list of dicts",
        "",
        *_with_peft(hub, card),
    ]
    if text:
        lines += ["", "Text of a row:", "", *(f"    {line}" for line in text.split("\n"))]
    answers = task.get("answers")
    if isinstance(answers, dict) and answers:
        lines += ["", "Answers, which follow the text:", ""]
        lines += [f"    {label}: {str(answer)!r}" for label, answer in answers.items()]
    return lines


def _with_peft(hub: str | None, card: Mapping[str, Any]) -> list[str]:
    task, head = card.get("task") or {}, _head(card)
    if PROMPT_MARK in str(task.get("text")):
        return [
            "The prompt stands inside the text, at `<prompt>`; peft would put it in front, so it doesn't load this."
        ]
    family, kind = (card.get("model") or {}).get("family"), (card.get("result") or {}).get("prompt")
    if kind == "deep" and peft_type(kind, head, family) == IN_LAYERS_TYPE:
        return [
            "The prompt is keys and values of every layer, which peft doesn't bring into this model's: it refuses this."
        ]
    auto, name = _AUTO_CLASS.get(head, "AutoModel"), f'"{hub}"' if hub else '"MODEL"'
    outputs = (card.get("head") or {}).get("outputs") or len(task.get("answers") or {})  # older cards: no outputs
    classes = f", num_labels={outputs}" if head == "classes" else ""
    lines = [
        "With peft, which puts the prompt in front of any text:",
        "",
        "    from peft import PeftModel",
        f"    from transformers import {auto}, AutoTokenizer",
        "",
        f"    tokenizer = AutoTokenizer.from_pretrained({name})",
        f"    base = {auto}.from_pretrained({name}{classes})",
        f'    model = PeftModel.from_pretrained(base, "{OWN_ID}").eval()',
    ]
    if hub and head == "causal":
        lines += ["", f'`peft.AutoPeftModelForCausalLM.from_pretrained("{OWN_ID}")` takes the model from here, too.']
    return lines


def _trained_on(card: Mapping[str, Any]) -> list[str]:
    data, result = card.get("data"), card.get("result") or {}
    settings = result.get("settings")
    known = settings if isinstance(settings, dict) else {}
    lines = []
    if isinstance(data, dict):
        if dataset := _hub_dataset(card):
            source = f"the hub's data set [{dataset}](/datasets/{dataset})"
        elif all(data.get(name) is None for name in ("data_dir", "dataset", "elsewhere")):
            source = "the small data set that ships with ptp_ds"
        else:
            source = "files of its owner's"
        split = f", split `{known['train_split']}`" if _text(known.get("train_split")) else ""
        digest = f" (sha256 of the rows {result['training_data_sha256'][:16]})" if _text(
            result.get("training_data_sha256")) else ""  # fmt: skip
        lines += [f"Rows: {source}{split}{digest}."]
    told = [f"`{name}` {known[name]}" for name in _TRAINED_WITH if known.get(name) is not None]
    lines += [f"Settings: {', '.join(told)}; all of them are in `ptp_ds.json`."] if told else []
    return ["## What it was trained on", "", *lines] if lines else []


def _versions(card: Mapping[str, Any]) -> list[str]:
    versions = card.get("versions")
    items = versions.items() if isinstance(versions, dict) else ()
    known = [f"{name} {version}" for name, version in items if version]
    return [f"Versions: {', '.join(known)}."] if known else []
