"""A plan's tokens against those of a step that was trained, and its micro-batches against what training takes."""

import json
from dataclasses import replace

import pytest
import torch

from ptp_ds.backbone.shapes import config_of, elements, shape_of
from ptp_ds.commands.one_run import prepare
from ptp_ds.commands.plan import parse_plan
from ptp_ds.commands.train import main as train
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.packing.layouts import TreeRows
from ptp_ds.planning.plan import estimate, most_tokens
from ptp_ds.planning.report import plans, report
from ptp_ds.planning.way import Way, activation_bytes
from ptp_ds.planning.work import Layout, load_of
from ptp_ds.training.meter import Meter
from tests.planning.test_plan import cluster_of
from tests.support.paths import ROOT
from tests.support.tiny import make_wordpiece

MACHINE = ["--hosts", "1", "--gpus", "1", "--gpu_memory", "80"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a bare random BertModel with its tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer, folder = make_wordpiece(), tmp_path_factory.mktemp("bert") / "bare"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=256)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# All 82 rows of CB that train, so that no row's share is a mean.
STEP = ["--task", "CB", "--batch_size", "82", "--prompt_length", "20", "--precision", "fp32"]


def planned(flags):
    load = plans(*parse_plan([*MACHINE, *flags])[:3])[1]
    return load.tokens + load.prefix


@pytest.mark.parametrize("model", ["causal", "bert"])
def test_tokens_are_those_of_a_trained_step(model, tiny_model, bert, monkeypatch, tmp_path):
    seen, add = [], Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, loss, *rest: (seen.append(loss.tokens), add(self, loss, *rest))[1])
    longest = {"causal": "130", "bert": "125"}[model]  # some rows are cut
    flags = ["--model", str(bert if model == "bert" else tiny_model), *STEP, "--max_length", longest]
    assert train([*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 0
    assert planned(flags) == seen[0]


@pytest.mark.parametrize("more", [["--perturbation", "none"], ["--target", "both", "--max_length", "130"]], ids=str)
@pytest.mark.parametrize("model", ["causal", "bert"])
def test_tokens_are_those_of_the_rows_that_training_packs(model, more, tiny_model, bert):
    flags = ["--model", str(bert if model == "bert" else tiny_model), *STEP, *more]
    prepared = prepare(replace(parse_plan([*MACHINE, *flags])[1], batch_size=1))
    train_rows = prepared.examples.train
    flags += ["--batch_size", str(len(train_rows))]
    shared = prepared.rows.shared_start(train_rows)
    in_front = shared + (20 if isinstance(prepared.rows, TreeRows) else 0)
    packed = prepared.rows.pack(train_rows, shared).num_tokens
    assert planned(flags) == in_front + prepared.run.streams * packed


def test_a_prompt_within_the_text_is_in_every_row(tiny_model, tmp_path):
    text = json.loads((ROOT / "ptp_ds/tasks/templates/CB.json").read_text())
    marked = {**text, "text": text["text"].replace("{hypothesis}", "<prompt>{hypothesis}")}
    (tmp_path / "CB.json").write_text(json.dumps(marked))
    flags = ["--model", str(tiny_model), *STEP, "--perturbation", "none"]
    inside = planned([*flags, "--task", str(tmp_path / "CB.json")])
    assert inside > planned(flags) + 81 * 20


def test_what_training_refuses_a_plan_refuses(tiny_model):
    cluster, run, explicit, *_ = parse_plan([*MACHINE, "--model", str(tiny_model), *STEP, "--max_length", "9999"])
    with pytest.raises(UserError, match="--max_length 9999 must lie between the prompt's 20 tokens"):
        plans(cluster, run, explicit)


def test_members_are_counted_each_as_it_is(bert, tmp_path):
    """Rows that hold the prompt are longer by it; seeds alone are counted once."""
    (tmp_path / "members.yaml").write_text("- {name: a, prompt_length: 10}\n- {name: b, prompt_length: 30}\n")
    flags = [*MACHINE, "--model", str(bert), *STEP]
    ten, thirty, both = (
        plans(*parse_plan([*flags, *own])[:3])[1].tokens
        for own in (
            ["--prompt_length", "10"],
            ["--prompt_length", "30"],
            ["--population", str(tmp_path / "members.yaml")],
        )
    )
    assert thirty - ten == 2 * 20 * 82
    assert both == ten + thirty


def test_depth_takes_the_micro_batches_that_are_asked_for():
    """In every mode: four parts hold a fourth of the tokens each, and one rank's weights are gathered four times."""
    shape, cluster = shape_of(config_of("llama-8b")), cluster_of(hosts=1, gpus=8)
    asked = load_of(RunConfig(gradient_accumulation_steps=4), shape, 2, 1 << 18)
    layout = Layout("zero3", 3)
    found = {wanted: estimate(shape, asked, layout, cluster, wanted, "depth") for wanted in ("keep", "recompute")}
    assert {wanted: one.way for wanted, one in found.items()} == {"keep": Way(0, 4), "recompute": Way(32, 4)}
    assert [one.way.describe(shape.count) for one in found.values()] == ["parts:4", "parts:4,recompute"]
    for wanted, one in found.items():
        alone = replace(asked, tokens=asked.tokens // 4)
        assert one.memory.activations == activation_bytes(shape, alone, Way(one.way.recomputed), 8)
        assert one.activations[wanted] == one.memory.activations
        assert one.most_tokens[wanted] == most_tokens(shape, asked, layout, cluster, one.way)
    outside = elements(shape.outside_layers) * asked.size
    once = estimate(shape, asked, layout, cluster, "keep").gathered_bytes - outside
    assert found["keep"].gathered_bytes - outside == 4 * once
    assert estimate(shape, asked, layout, cluster, "keep", "breadth").way == Way()
    little = replace(asked, tokens=1 << 12)
    assert estimate(shape, little, layout, cluster, "auto", "depth").way == Way(0, 4)
    assert estimate(shape, replace(little, sections=1), layout, cluster, "auto", "depth").way == Way()


def test_a_step_that_fits_in_parts_alone_is_told_to_fit():
    flags = ["--hosts", "1", "--gpus", "8", "--gpu_memory", "40", "--model", "llama-8b", "--tokens_per_step", "262144",
             "--activations", "keep", "--schedule", "depth"]  # fmt: skip
    whole, parted = (report(*parse_plan([*flags, *more])[:3]) for more in ([], ["--gradient_accumulation_steps", "16"]))
    assert whole[1]["recommended"] is None
    assert parted[1]["recommended"] is not None
    row = next(line for line in parted[0].splitlines() if line.startswith("zero3 "))
    plan = next(plan for plan in parted[1]["plans"] if plan["layout"]["name"] == "zero3")
    assert row.split()[-2:] == ["parts:16", str(plan["most_tokens"]["keep"])]
