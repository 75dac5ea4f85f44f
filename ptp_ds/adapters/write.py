"""Writing an adapter: a folder in peft's format, our card and the hub's README.md beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ptp_ds.adapters.card import model_card
from ptp_ds.adapters.peft_format import (
    CARD_FILE,
    CONFIG_FILE,
    HEAD_PREFIX,
    PROMPT_KEY,
    TASK_TYPES,
    WEIGHTS_FILE,
    peft_type,
)
from ptp_ds.files import write_folder
from ptp_ds.models.heads import HeadPlan, module_to_save
from ptp_ds.prompts.deep import deep_shape
from ptp_ds.redact import redacted


def write_adapter(
    target: Path, prompt_PH: Tensor, base_model: str, backbone_config: Any, card: dict[str, Any], kind: str = "soft",
    plan: HeadPlan | None = None, head: Mapping[str, Tensor] | None = None, in_text: bool = False,
) -> None:  # fmt: skip
    """Writes a folder that peft's PeftModel.from_pretrained loads, unless peft would compute otherwise (see peft_type);
    `card` (task, scores, versions) lies beside.

    kind: soft, or deep with prompt_PH [P, D]. plan, head: the model's head and its trained tensors. in_text: whether
    the task's text has a place for the prompt, which peft can't express and then refuses to load.
    """
    plan, head, base_model, card = plan or HeadPlan(), head or {}, redacted(base_model), redacted(card)
    text = backbone_config.get_text_config()
    config = {
        "peft_type": peft_type(kind, plan.kind, backbone_config.model_type, in_text),
        "task_type": TASK_TYPES[plan.kind],
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
        tensors = {PROMPT_KEY: prompt_PH.float().clone()} | {
            HEAD_PREFIX + name: t.float().clone() for name, t in head.items()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(base_model, card), encoding="utf-8")

    write_folder(target, fill)
