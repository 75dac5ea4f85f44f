"""How training starts: the prompt that --prompt_init names."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.one_run import prepare
from ptp_ds.config.run_config import RunConfig
from ptp_ds.training import start
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


def test_deltas_that_the_dtype_loses_are_told(tiny_model, monkeypatch):
    """A token's share of them: of 1,600 that move together each has a fortieth."""
    run = RunConfig(model=str(tiny_model), task="CB", perturbation="pgd", precision="bf16", epsilon=0.032)
    prepared = prepare(run)
    stub = SimpleNamespace(mean_embedding_norm=lambda: 5.0, width=32)
    row = prepared.examples.train[0]
    long = replace(row, context_ids=[1] * 1600, movable=[True] * 1600, words=(), attackable=())
    rows = replace(prepared.examples, train=[long] * 3)
    told = {}
    for name, one in (
        ("short", prepared), ("long", replace(prepared, examples=rows)),
        ("per token", replace(prepared, examples=rows, run=replace(run, norm="token_l2"))),
        ("fp32", replace(prepare(replace(run, precision="fp32")), examples=rows)),
    ):  # fmt: skip
        said: list[str] = []
        monkeypatch.setattr(start.log, "warning", lambda text, *values, said=said: said.append(text % values))
        assert start.perturbation_unit(one, stub) == 5.0
        told[name] = any("deltas of norm 4.0e-03 on a token are mostly lost" in line for line in said)
    assert told == {"short": False, "long": True, "per token": False, "fp32": False}
