"""README.md beside an adapter: metadata that the hub's own classes read back, and a text that tells how to use it."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ptp_ds.adapters.card import card_data, model_card
from ptp_ds.adapters.hub import EMBEDDED_ON_THE_HUB
from ptp_ds.adapters.read import read_card
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.tasks import load_task


@pytest.fixture
def card(made) -> dict:
    """The card of a run on a model and data of the hub."""
    held = read_card(made)
    held["model"]["name"] = "owner/model"
    held["data"] = {"data_dir": None, "dataset": "owner/data"}
    return held


def test_the_metadata_are_read_back_as_they_were_made(card):
    data = card_data("owner/model", card)
    read = ModelCard(model_card("owner/model", card)).data
    assert read.to_dict() == data.to_dict()
    assert read.eval_results == data.eval_results
    assert {one.metric_name: one.metric_value for one in read.eval_results} == card["result"]["metrics"]
    assert [one.metric_type for one in read.eval_results] == ["accuracy", "f1"]
    (where,) = {(one.task_type, one.dataset_type, one.dataset_name, one.dataset_config, one.dataset_split)
                for one in read.eval_results}  # fmt: skip
    assert where == ("text-classification", "owner/data", "CB", "cb", "dev")
    assert (read.base_model, read.library_name, read.pipeline_tag) == ("owner/model", "peft", "text-generation")
    assert read.datasets == ["owner/data"]
    assert {"prompt-tuning", "ptp", "ptp-soft"} <= set(read.tags)
    assert "license" not in read.to_dict(), "the owner's to choose"


@pytest.mark.parametrize(
    ("kind", "tag", "loader"),
    [
        ("causal", "text-generation", "AutoModelForCausalLM"), ("masked", "fill-mask", "AutoModelForMaskedLM"),
        ("classes", "text-classification", "AutoModelForSequenceClassification"),
        ("seq2seq", "text2text-generation", "AutoModelForSeq2SeqLM"),
    ],
)  # fmt: skip
def test_the_head_tells_the_pipeline_and_how_peft_loads_it(card, kind, tag, loader):
    card["head"] = {"kind": kind}
    text = model_card("owner/model", card)
    assert ModelCard(text).data.pipeline_tag == tag
    assert f"base = {loader}.from_pretrained(" in text
    assert ("num_labels=3" in text) == (kind == "classes")
    assert ("AutoPeftModelForCausalLM" in text) == (kind == "causal")


@pytest.mark.parametrize("task", ["COPA", "WSC"])
def test_a_classifier_of_answers_that_differ_has_one_output(card, task):
    card |= {"task": load_task(task).spec(), "head": {"kind": "classes", "choice": True, "outputs": 1}}
    assert "num_labels=1)" in model_card("owner/model", card)


def test_the_text_says_what_it_is_and_how_to_use_it(card):
    text = model_card("owner/model", card)
    for part in (
        "# A prompt for CB", "| metric, dev (56 rows) | score |", "| accuracy | 0.7500 |",
        "| accuracy of the untrained prompt | 0.2500 |", "| accuracy of the majority class | 0.5000 |",
        "One run: perturbation own, prompt soft, seed 3, steps 4. Scores differ between seeds",
        "ptp evaluate --adapter OWNER/NAME --data_dir DATA", 'ptp_ds.Predictor.from_pretrained("OWNER/NAME")',
        'PeftModel.from_pretrained(base, "OWNER/NAME")', "    {premise}\n    Question: {hypothesis} True, False or",
        "    entailment: ' True'", "Rows: the hub's data set [owner/data]", "sha256 of the rows 0123456789abcdef)",
        "Versions: torch 2.13.0.",
    ):  # fmt: skip
        assert part in text
    assert "None" not in text


def test_the_embedded_model_is_named_as_on_the_hub_and_its_weights_are_told(card):
    card["model"]["name"] = EMBEDDED_MODEL
    for base in (EMBEDDED_ON_THE_HUB, "/somebody/cache/smollm2-135m-b179c952"):  # as written now, and before
        text = model_card(base, card)
        assert ModelCard(text).data.base_model == EMBEDDED_ON_THE_HUB
        assert "the Q4_1-quantised weights" in text
        assert "/somebody" not in text


def test_a_folder_s_model_and_data_are_not_named(made, tmp_path, tiny_model):
    text = (made / "README.md").read_text()
    assert "base_model" not in text
    assert "ptp predict --adapter OWNER/NAME --model MODEL" in text
    assert "Rows: files of its owner's, split `train`" in text
    for path in (tmp_path, tiny_model):
        assert str(path) not in text


def test_answers_of_the_row_s_own_and_a_prompt_in_the_text(card):
    card["task"] = load_task("COPA").spec()
    assert {one.task_type for one in card_data(None, card).eval_results} == {"multiple-choice"}
    card["task"]["text"] = "{premise} <prompt> {question}"
    assert "peft would put it in front, so it doesn't load this" in model_card("owner/model", card)


@pytest.mark.parametrize(
    "card",
    [
        {}, {"task": {"name": 3, "text": None, "answers": None}}, {"result": {"metrics": {"accuracy": "high"}}},
        {"result": {"metrics": {"accuracy": float("nan")}, "untrained": [1], "settings": [2], "eval_split": 4}},
        {"data": {"dataset": ["x"], "data_dir": 5}, "versions": [1], "model": {"name": {}}, "head": {"kind": None}},
    ],
)  # fmt: skip
def test_a_card_that_says_little_or_nonsense_still_gives_a_valid_one(card):
    text = model_card(None, card)
    assert re.match(r"---\nlibrary_name: peft\n", text)
    assert "eval_results" not in ModelCard(text).data.to_dict()
    assert "None" not in text


def test_names_that_look_like_yaml_stay_text(card):
    card["task"]["name"] = "a: b # {x}"
    assert {one.dataset_name for one in ModelCard(model_card(None, card)).data.eval_results} == {"a: b # {x}"}


def test_every_command_of_the_card_is_one_of_ours(card):
    """The card's commands by the commands' own parsers: a flag that is renamed fails here."""
    from ptp_ds.commands.predict import _parse as predict
    from ptp_ds.config.parsers import evaluate_parser

    commands = re.findall(r"^    ptp (\w+) (.*)$", model_card("owner/model", card), re.MULTILINE)
    assert [name for name, _ in commands] == ["predict", "evaluate"]
    for name, flags in commands:
        if name == "predict":
            predict(flags.split(), "")
        else:
            evaluate_parser().parse_args(flags.split())


def test_json_of_the_card_is_what_is_written(made, card):
    assert json.loads((Path(made) / "ptp_ds.json").read_text())["result"] == card["result"]
