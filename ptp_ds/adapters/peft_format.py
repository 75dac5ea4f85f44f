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
PROMPT_OF_TYPE = {"PROMPT_TUNING": "soft", "P_TUNING": "soft", "PREFIX_TUNING": "deep", IN_TEXT_TYPE: "soft"}
TASK_TYPES = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "classes": "SEQ_CLS",
          "seq2seq": "SEQ_2_SEQ_LM"}  # fmt: skip
HEAD_PREFIX = "base_model."  # peft's prefix of a head's tensors
