"""How training starts: the prompt that --prompt_init names, what the backbone's path makes of settings."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

import ptp_ds
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.one_run import prepare
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.training import start
from ptp_ds.training.start import initial_trained
from tests.support.reference import relative_error
from tests.support.runs import adapter


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


def test_a_text_starts_at_the_words_given_or_at_the_task_s_instruction(tiny_model, tokenizer):
    """The instruction is a resume's init_text, as words that were given are."""
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(tiny_model))
    table = backbone.model.get_input_embeddings().weight
    run = RunConfig(model=str(tiny_model), task="CB", prompt_length=3, prompt_init="text")
    instruction = ptp_ds.load_task("CB").instruction
    for given, words in ((None, instruction), ("Is it so?", "Is it so?")):
        prepared = prepare(replace(run, init_text=given))
        assert prepared.run.init_text == prepared.identity["init_text"] == words
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert torch.equal(initial_trained(prepared, backbone), table[(ids * 3)[:3]])


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


@pytest.fixture(scope="module")
def generic(tiny_model, tmp_path_factory):
    """Folder of a model that takes no attention function from outside: rows are padded."""
    folder = tmp_path_factory.mktemp("bloom")
    torch.manual_seed(3)
    config = BloomConfig(vocab_size=600, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    BloomForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_the_generic_path_takes_the_micro_batches_that_are_asked_for(generic, tmp_path, monkeypatch):
    """One after the other, with the prompt of the run that takes all rows in one forward; --activations is told of."""
    forward, rows, said = BloomForCausalLM.forward, [], []

    def counted(self, *args, **kwargs):
        if torch.is_grad_enabled():
            rows.append(kwargs["inputs_embeds"].shape[0])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BloomForCausalLM, "forward", counted)
    monkeypatch.setattr(start.log, "warning", lambda text, *values: said.append(text % values))
    found, seen = {}, {}
    for schedule in ("auto", "breadth"):
        rows.clear()
        ptp_ds.train(
            task="RTE", model=generic, output_dir=tmp_path / schedule, ds_config="zero2", verbose=False,
            prompt_length=4, batch_size=8, max_steps=2, gradient_accumulation_steps=4, schedule=schedule,
            activations="recompute", chunk_tokens=64, perturbation="gaussian",
        )  # fmt: skip
        found[schedule], seen[schedule] = adapter(tmp_path / schedule), rows[-(8 if schedule == "auto" else 2) :]
    assert seen == {"auto": [2 * 4] * 8, "breadth": [8 * 4] * 2}  # two streams, two answers of several tokens
    assert relative_error(found["auto"], found["breadth"]) < 1e-5
    assert said.count(
        "warning: --activations and --chunk_tokens have no effect on the generic path, which keeps all activations of "
        "a micro-batch; give more --gradient_accumulation_steps to save memory there"
    ) == 2  # fmt: skip


def test_a_budget_counts_rows_as_the_generic_path_lays_them_out(generic, tmp_path, monkeypatch):
    """With the prompt in each: packed, 200 tokens would hold three rows of COPA, here a batch holds one and two
    micro-batches need a row each. Of several prompts it is the long one that doesn't fit."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    given = {"task": "COPA", "model": generic, "ds_config": "zero2", "gradient_accumulation_steps": 2, "verbose": False,
             "eval_tokens": 2000, "max_steps": 1, "perturbation": "none"}  # fmt: skip
    members = [{"name": "short", "prompt_length": 4}, {"name": "long", "prompt_length": 30}]
    (tmp_path / "members.json").write_text(json.dumps(members))
    said = r"--tokens_per_step 200 holds 1 of the \d+ training rows in batch 1, and each of the 2 micro-batches.* give "
    with pytest.raises(UserError, match=f"^{said}--tokens_per_step") as told:
        ptp_ds.train(**given, prompt_length=30, tokens_per_step=200, output_dir=tmp_path / "refused")
    with pytest.raises(UserError, match=f"^Member long: {said}"):
        ptp_ds.train(**given, population=tmp_path / "members.json", tokens_per_step=200, output_dir=tmp_path / "both")
    assert not list(tmp_path.rglob("log.jsonl")), "before anything is trained"
    enough = int(re.search(r"give --tokens_per_step (\d+), which is always enough", str(told.value))[1])
    done = ptp_ds.train(**given, prompt_length=30, tokens_per_step=enough, output_dir=tmp_path / "done")
    assert done.record["steps"] == 1
