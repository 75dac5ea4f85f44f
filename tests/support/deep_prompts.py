"""Deep prompts by transformers' own cache of keys and values."""

import torch
from transformers import DynamicCache

from ptp_ds.prompts import prompt_width
from ptp_ds.prompts.deep import split_deep
from tests.support.reference import candidate_scores

WINDOWED = {"mistral", "gemma2"}  # their caches drop what lies outside of the window


def deep_prompt(model, dtype=torch.float32):
    width = prompt_width("deep", model.config)
    return 0.5 * torch.randn(5, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def cached_scores(model, prompt_PD, example, delta_LH=None):
    """[C] log-probabilities by transformers' past_key_values, a candidate at a time."""

    def forward(rows_LH):
        cache, length = DynamicCache(), rows_LH.shape[0]
        for layer, ((k, v),) in split_deep(prompt_PD, model.config).items():
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
        positions, mask = torch.arange(5, 5 + length)[None], torch.ones(1, 5 + length, dtype=torch.long)
        out = model(inputs_embeds=rows_LH[None], past_key_values=cache, position_ids=positions, attention_mask=mask)
        return out.logits[0]

    return candidate_scores(model, forward, example, delta_LH)
