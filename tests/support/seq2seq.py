"""Tiny encoder-decoders, and their scores by plain forwards."""

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.support.reference import VOCABULARY

_COMMON = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
SEQ2SEQ = {
    "t5": {**_COMMON, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8},
    "bart": {**_COMMON, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "max_position_embeddings": 96, "bos_token_id": 0, "forced_eos_token_id": None},
}  # fmt: skip


def make_seq2seq(family):
    torch.manual_seed(11)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **SEQ2SEQ[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.requires_grad_(False)


def plain_scores(model, prompt, example, delta=None):
    """[C] by one ordinary forward an answer."""
    embed = model.get_input_embeddings()
    context = embed(torch.tensor(list(example.context_ids)))
    context = context if delta is None else context + delta
    inputs = torch.cat([prompt, context, embed(torch.tensor([1]))])[None]
    scores = []
    for candidate in example.candidate_ids:
        ids = torch.tensor([[0, *candidate[:-1]]])
        log_probs = model(inputs_embeds=inputs, decoder_input_ids=ids).logits[0].log_softmax(-1)
        scores.append(sum(log_probs[place, token] for place, token in enumerate(candidate)))
    return torch.stack(scores)
