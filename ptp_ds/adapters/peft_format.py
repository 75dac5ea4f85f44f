"""peft's format of an adapter: adapter_config.json, adapter_model.safetensors, and what its types are called.

A soft prompt is peft's PROMPT_TUNING, a deep one its PREFIX_TUNING; a trained classifier lies beside it as peft's
modules_to_save. peft knows no masked language models: FEATURE_EXTRACTION is its type that runs any model's own forward.
Where peft trains a prompt through an MLP or LSTM (P_TUNING, PREFIX_TUNING with prefix_projection), it saves the prompt
that came out, so these are read alike.
"""

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "ptp_ds.json"
README_FILE = "README.md"
PROMPT_KEY = "prompt_embeddings"
TYPE_OF_PROMPT = {"soft": "PROMPT_TUNING", "deep": "PREFIX_TUNING"}
IN_TEXT_TYPE = "PTP_DS_SOFT_IN_TEXT"  # ours: peft would put the prompt in front, so it must not know the type
IN_LAYERS_TYPE = "PTP_DS_DEEP"  # ours: a deep prompt that peft would refuse at the first row, or leave out silently
PROMPT_OF_TYPE = {"PROMPT_TUNING": "soft", "P_TUNING": "soft", "PREFIX_TUNING": "deep", IN_TEXT_TYPE: "soft",
                  IN_LAYERS_TYPE: "deep"}  # fmt: skip
_TAKE_KEYS = ("bert", "roberta", "xlm-roberta", "electra")  # encoders to which peft hands keys and values
TASK_TYPES = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "classes": "SEQ_CLS",
          "seq2seq": "SEQ_2_SEQ_LM"}  # fmt: skip
HEAD_PREFIX = "base_model."  # peft's prefix of a head's tensors


def peft_type(kind: str, head: str, family: str | None, in_text: bool = False) -> str:
    """What adapter_config.json calls an adapter: peft's type where peft computes what we do, else one that it refuses.

    kind: soft or deep. head: see ptp_ds.models.heads. family: transformers' model_type. in_text: see write_adapter.
    """
    if in_text:
        return IN_TEXT_TYPE
    if kind == "deep" and head != "causal" and family not in _TAKE_KEYS:
        return IN_LAYERS_TYPE
    return TYPE_OF_PROMPT[kind]
