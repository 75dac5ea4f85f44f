"""Tiny encoders with a masked or a trained head, and their scores and losses by plain forwards."""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.models.heads import Head, is_trained
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.prompts.deep import deep_width
from tests.support.packed import divergence
from tests.support.reference import VOCABULARY

_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 96, "pad_token_id": 1,
}  # fmt: skip
ENCODERS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 24},
    "albert": {**_BERT, "embedding_size": 24, "num_hidden_layers": 3},
    "modernbert": {**_BERT, "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 8,
                   "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None,
                   "sep_token_id": None},
    "distilbert": {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
                   "max_position_embeddings": 96, "pad_token_id": 1},
}  # fmt: skip
# Families that take the generic path (tests/backbone/test_padded.py).
GENERIC = {
    "deberta-v2": {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 32},
    "mpnet": _BERT,
}  # fmt: skip
KINDS = {"masked": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}
PROMPT = 5


def make_encoder(family, kind, labels=3):
    torch.manual_seed(11)
    config = AutoConfig.for_model(family, **{**ENCODERS, **GENERIC}[family])
    config.num_labels = labels
    model = KINDS[kind].from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def make_head(model, kind, choice=False):
    named = model.named_parameters() if kind == "classes" else []
    return Head(kind, choice, {name: tuple(p.shape) for name, p in named if is_trained(name)})


def make_backbone(family, kind, prompt="soft", choice=False):
    model = make_encoder(family, kind, 1 if choice else 3)
    rows = SeparateRows(kind=kind, prompt_length=PROMPT if prompt == "soft" else 0, mask_id=4, tail=(2,), choice=choice)
    return Backbone(model, prompt=prompt, head=make_head(model, kind, choice), rows=rows)


def make_values(backbone):
    """Prompt and head, random, as one matrix."""
    generator = torch.Generator().manual_seed(1)
    width = backbone.width if backbone.prompt == "soft" else deep_width(backbone.model.config)
    prompt = 0.3 * torch.randn(PROMPT, width, generator=generator)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in backbone.head.trained.items()}
    return backbone.head.join(prompt, tensors)


def plain_scores(model, kind, trained, head, example, delta=None, choice=False):
    """[C] by an ordinary forward a candidate; `model` is the family's own, eager."""
    prompt, tensors = head.split(trained)
    embed = model.get_input_embeddings()
    context = embed(torch.tensor(list(example.context_ids)))
    context = context if delta is None else context + delta
    scores = []
    for number, candidate in enumerate(example.candidate_ids):
        behind = {"masked": [4] * len(candidate), "classes": list(candidate) if choice else []}[kind]
        inputs = torch.cat([prompt, context, embed(torch.tensor([*behind, 2]))])[None]
        out = torch.func.functional_call(model, tensors, kwargs={"inputs_embeds": inputs}).logits[0]
        if kind == "classes":
            scores.append(out[0] if choice else out[number])
        else:
            first = PROMPT + len(example.context_ids)
            log_probs = out.log_softmax(-1)
            scores.append(sum(log_probs[first + place, token] for place, token in enumerate(candidate)))
    return torch.stack(scores)


def plain_step(backbone, family, kind, trained, examples, deltas, choice):
    """Summed loss (sym_kl, lambda 0.7) by one forward a candidate and stream."""
    model = make_encoder(family, kind, 1 if choice else 3)
    total = 0.0
    for example, delta in zip(examples, deltas, strict=True):
        clean = plain_scores(model, kind, trained, backbone.head, example, choice=choice)
        perturbed = plain_scores(model, kind, trained, backbone.head, example, delta, choice)
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    return total
