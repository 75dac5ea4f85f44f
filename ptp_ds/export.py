"""Adapters in peft's format, in and out: adapter_config.json and adapter_model.safetensors.

A soft prompt is peft's PROMPT_TUNING, a deep one its PREFIX_TUNING; a trained classifier lies beside it as peft's
modules_to_save. peft knows no masked language models: FEATURE_EXTRACTION is its type that runs any model's own forward.
Where peft trains a prompt through an MLP or LSTM (P_TUNING, PREFIX_TUNING with prefix_projection), it saves the prompt
that came out, so these are read alike.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptp_ds.card import model_card
from ptp_ds.checkpoint import write_folder
from ptp_ds.files import brief, is_file, listed, open_tensors, read_json, tensor_shape
from ptp_ds.heads import HEADS, HeadPlan, module_to_save
from ptp_ds.prompts.deep import deep_shape
from ptp_ds.redact import redacted

_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "ptp_ds.json"
_KEY = "prompt_embeddings"
_WRITTEN = {"soft": "PROMPT_TUNING", "deep": "PREFIX_TUNING"}
_IN_TEXT = "PTP_DS_SOFT_IN_TEXT"  # ours: peft would put the prompt in front, so it must not know the type
_READ = {"PROMPT_TUNING": "soft", "P_TUNING": "soft", "PREFIX_TUNING": "deep", _IN_TEXT: "soft"}
_TASKS = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "classes": "SEQ_CLS",
          "seq2seq": "SEQ_2_SEQ_LM"}  # fmt: skip
_HEAD = "base_model."  # peft's prefix of a head's tensors


def write_adapter(
    target: Path, prompt_PH: Tensor, base_model: str, backbone_config: Any, card: dict[str, Any], kind: str = "soft",
    plan: HeadPlan | None = None, head: Mapping[str, Tensor] | None = None, in_text: bool = False,
) -> None:  # fmt: skip
    """Writes a folder that peft's PeftModel.from_pretrained loads; `card` (task, scores, versions) lies beside.

    kind: soft, or deep with prompt_PH [P, D]. plan, head: the model's head and its trained tensors. in_text: whether
    the task's text has a place for the prompt, which peft can't express and then refuses to load.
    """
    plan, head, base_model, card = plan or HeadPlan(), head or {}, redacted(base_model), redacted(card)
    text = backbone_config.get_text_config()
    config = {
        "peft_type": _IN_TEXT if in_text else _WRITTEN[kind],
        "task_type": _TASKS[plan.kind],
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": prompt_PH.shape[0],
        "token_dim": prompt_PH.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": text.num_attention_heads,
        "num_layers": text.num_hidden_layers,
        "revision": None,
    }
    if kind == "soft":
        config |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    else:
        _, heads, width = deep_shape(backbone_config)
        config |= {"token_dim": heads * width, "num_attention_heads": heads, "encoder_hidden_size": heads * width,
                   "prefix_projection": False}  # fmt: skip
    if head:
        config["modules_to_save"] = sorted({module_to_save(name) for name in head})

    def fill(folder: Path) -> None:
        tensors = {_KEY: prompt_PH.float().clone()} | {_HEAD + name: t.float().clone() for name, t in head.items()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / _CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(base_model, card), encoding="utf-8")

    write_folder(target, fill)


def adapter_kind(folder: str | Path) -> str:
    """soft or deep; ValueError for a folder that holds neither."""
    folder = Path(folder)
    if not is_file(folder / _CONFIG):
        raise ValueError(f"Adapter {folder}: no {_CONFIG} there; give a folder written by this project or peft.")
    config = read_json(folder / _CONFIG, f"Adapter {folder}: {_CONFIG}")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(f"Adapter {folder} is of peft type {brief(kind)}; expected {', '.join(_READ)}.")
    return _READ[kind]


def read_adapter(
    folder: str | Path, width: int | None = None, length: int | None = None, kind: str | None = None
) -> Tensor:
    """The prompt [P, H], or [P, D] of a deep one, fp32. width, length, kind: what the run needs, checked if given.

    Reads the header before the data and loads safetensors only. Raises ValueError with what is wrong.
    """
    folder = Path(folder)
    found = adapter_kind(folder)
    if kind is not None and found != kind:
        raise ValueError(f"Adapter {folder} holds a {found} prompt; set --prompt {found}.")
    file, where = folder / _WEIGHTS, f"Adapter {folder}: {_WEIGHTS}"
    if not is_file(file):
        raise ValueError(f"Adapter {folder}: no {_WEIGHTS}; adapters in pickle files are not loaded.")
    with open_tensors(file, where) as handle:
        names = list(handle.keys())
        if [name for name in names if not name.startswith(_HEAD)] != [_KEY]:
            raise ValueError(f"Adapter {folder} holds {listed(names)}; expected {_KEY} alone.")
        shape = tensor_shape(handle, _KEY, where)
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"Adapter {folder}: the prompt has shape {brief(shape)}; expected [length, width].")
        if width is not None and shape[1] != width:
            raise ValueError(f"Adapter {folder} has width {shape[1]}, the model's is {width}: another model's adapter.")
        if length is not None and shape[0] != length:
            raise ValueError(f"Adapter {folder} has {shape[0]} tokens; set --prompt_length {shape[0]}.")
        prompt = handle.get_tensor(_KEY).float()
    if not bool(torch.isfinite(prompt).all()):
        raise ValueError(f"Adapter {folder}: the prompt holds values that are not finite.")
    return prompt


def read_head(folder: str | Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The trained head's tensors beside an adapter's prompt, fp32, by the model's names.

    wanted: names and shapes that the model has. ValueError where the adapter's differ.
    """
    where = f"Adapter {folder}: {_WEIGHTS}"
    with open_tensors(Path(folder) / _WEIGHTS, where) as handle:
        names = [name for name in handle.keys() if name != _KEY]  # noqa: SIM118
        shapes = {name.removeprefix(_HEAD): tensor_shape(handle, name, where) for name in names}
        if shapes != dict(wanted) or len(shapes) < len(names):
            raise ValueError(
                f"Adapter {folder} holds a head of {brief(shapes) if shapes else 'nothing'}; "
                f"this model and task need {dict(wanted) or 'none'}."
            )
        found = {name.removeprefix(_HEAD): handle.get_tensor(name).float() for name in names}
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"Adapter {folder}: {name} holds values that are not finite.")
    return found


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card beside an adapter of ours, empty for one of peft's own; ValueError for one that isn't as we write it."""
    file = Path(folder) / _CARD
    if not os.path.lexists(file):
        return {}
    where = f"Adapter {folder}: {_CARD}"
    card = read_json(file, where)
    if not isinstance(card, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(card).__name__}.")
    for name in ("task", "head", "result"):
        if not isinstance(card.get(name), dict | None):
            raise ValueError(f"{where}: {name} is {brief(card[name])}; expected a JSON object.")
    kind, answers = (card.get("head") or {}).get("kind", HEADS[0]), (card.get("task") or {}).get("answers")
    if kind not in HEADS:
        raise ValueError(f"{where}: the head is of kind {brief(kind)}; expected {', '.join(HEADS)}.")
    if not isinstance(answers, dict | None):
        raise ValueError(f"{where}: the task's answers are {brief(answers)}; expected a JSON object.")
    return card
