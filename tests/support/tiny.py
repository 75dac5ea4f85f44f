"""Tokenizers of tiny models, and the texts they are trained on."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ptp_ds.tasks.data import DEMO_DATA

CONTEXT = 512  # positions of the tiny model


def demo_texts() -> list[str]:
    files = sorted(DEMO_DATA.glob("*/*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [value for row in rows for value in row.values() if isinstance(value, str)]


def make_tokenizer() -> Any:
    """A byte-level BPE of 600 tokens trained on the demo data; it encodes any text without <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(demo_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="<eos>", model_max_length=CONTEXT)


def make_wordpiece() -> Any:
    """A BERT tokenizer of the demo data's letters and commonest words: the same one each time (the library's trainer
    breaks ties at random, and a model behind another vocabulary is another model)."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    words = Counter(re.findall(r"\w+|[^\w\s]", " ".join(demo_texts()).lower()))
    letters = sorted({letter for word in words for letter in word})
    common = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters), *common][:700]
    made = BertWordPieceTokenizer({token: number for number, token in enumerate(tokens)}, lowercase=True)
    return BertTokenizerFast(tokenizer_object=made._tokenizer)


def write_tiny_model(folder: Path) -> None:
    """A random Llama (width 32, 2 layers, 512 positions) and its tokenizer, as save_pretrained writes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, pad_token_id=None,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
