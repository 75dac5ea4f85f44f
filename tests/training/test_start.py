"""How training starts: the prompt that --prompt_init names."""

import torch
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.one_run import prepare
from ptp_ds.config.run_config import RunConfig
from ptp_ds.training.start import initial_trained


def test_labels_start_at_the_tokens_that_are_scored(tiny_model, tokenizer):
    """Those behind the context, with the space that each answer begins with."""
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(tiny_model))
    run = RunConfig(model=str(tiny_model), task="CB", prompt_length=30, prompt_init="labels")
    context, words = tokenizer("Answer:")["input_ids"], []
    for answer in (" True", " False", " Neither"):
        words += tokenizer(f"Answer:{answer}")["input_ids"][len(context) :]
    table = backbone.model.get_input_embeddings().weight
    start = initial_trained(prepare(run), backbone)
    assert torch.equal(start[: len(words)], table[words])
    assert start.shape == (30, 32)
