"""What an adapter says of its run, and what a command makes of it: model, head, data, split; every message."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ptp_ds.adapters.origin import (
    adapter_model,
    adapter_rows,
    adapter_split,
    data_record,
    model_record,
    trained_max_length,
)
from ptp_ds.adapters.read import adapter_folder
from ptp_ds.adapters.served import serve
from ptp_ds.adapters.task import adapter_head
from ptp_ds.adapters.write import write_adapter
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.source import load_config, open_source
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import DEMO_DATA

ROWS = [{"premise": f"It rains {n} days.", "hypothesis": "It is wet.", "label": "entailment"} for n in range(3)]


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """The tiny model where a test may move it."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def data(tmp_path, write_rows) -> Path:
    """A data folder with three rows of RTE."""
    return write_rows(tmp_path / "data" / "RTE" / "dev.jsonl", ROWS).parents[1]


@pytest.fixture
def adapter(model, data, tmp_path, monkeypatch) -> Path:
    """An adapter of RTE whose run was given model and data by relative paths."""
    monkeypatch.chdir(tmp_path)
    run, task = RunConfig(model="model", task="RTE", data_dir="data", eval_split="dev"), load_task("RTE")
    source = open_source(run.model, run.head, task)
    card = {
        "task": task.spec(), "head": {"kind": "causal"}, "model": model_record(run, source), "data": data_record(run),
        "result": {"eval_split": "dev", "settings": {"max_length": 100}},
    }  # fmt: skip
    write_adapter(tmp_path / "run" / "adapter", torch.randn(4, 32), str(model), source.config, card)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "run" / "adapter"


def change(adapter: Path, **parts) -> None:
    """The card with other parts; None takes one off."""
    card = json.loads((adapter / "ptp_ds.json").read_text())
    kept = {name: part for name, part in (card | parts).items() if part is not None}
    (adapter / "ptp_ds.json").write_text(json.dumps(kept))


def test_the_run_s_model_task_data_split_and_length_are_the_defaults(adapter, model, data, capsys):
    served = serve([adapter.parent])
    assert served.model == str(model)
    assert served.task.name == "RTE"
    assert served.room == 96
    split = adapter_rows(adapter, served.task)
    assert split.rows == ROWS
    assert f"data of the adapter's run: {data}\n" in capsys.readouterr().out
    assert serve([adapter], max_length=50).room == 46


def test_a_moved_model_is_the_adapter_s(adapter, model, tmp_path):
    model.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"was trained on the model in .*/model, which is gone; give --model\.$"):
        serve([adapter])
    assert serve([adapter], model=str(tmp_path / "moved")).source.width == 32


def test_another_model_of_the_same_shape_is_refused(adapter, model, tmp_path):
    from transformers import LlamaForCausalLM

    other = Path(shutil.copytree(model, tmp_path / "other"))
    torch.manual_seed(1)
    LlamaForCausalLM(load_config(model)).save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"was trained on .*/model, and .*/other is another model: its weights are oth"
    ):
        serve([adapter], model=str(other))
    shutil.rmtree(model)
    other.rename(model)  # another model in the old one's place
    with pytest.raises(ValueError, match="another model: its weights are others; give the one that it was trained on"):
        serve([adapter])


@pytest.mark.parametrize(
    ("said", "why"),
    [({"family": "gpt2"}, "its family is 'llama', not 'gpt2'"), ({"width": 576}, "its width is 32, not 576")],
)
def test_another_family_or_width_is_refused(adapter, model, said, why):
    card = json.loads((adapter / "ptp_ds.json").read_text())
    change(adapter, model=card["model"] | said)
    with pytest.raises(ValueError, match=f"is another model: {why}; give the one"):
        serve([adapter], model=str(model))


def test_every_adapter_of_an_ensemble_has_its_own_model(adapter, tmp_path):
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    assert len(serve([adapter, second]).prompts) == 2
    change(second, model={"family": "gpt2"})
    with pytest.raises(
        ValueError, match=r"second was trained on a model that it doesn't name, and .* is another model: its family"
    ):
        serve([adapter, second])


def test_a_config_that_was_written_anew_is_told(adapter, model, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    serve([adapter])
    assert "is not the one that adapter " in capsys.readouterr().err


def test_data_that_is_gone_is_asked_for(adapter, data):
    shutil.rmtree(data)
    with pytest.raises(
        ValueError, match=r"was trained on data in .*/data, which is gone; give --data_dir or --dataset\."
    ):
        adapter_rows(adapter, load_task("RTE"))
    given = adapter_rows(adapter, load_task("RTE"), "val", data_dir=str(DEMO_DATA))
    assert len(given.rows) == 64


@pytest.mark.parametrize(("place", "data_dir"), [("run", "runs/x/data"), ("ten/members/x", "ten/data")])
def test_data_in_the_run_s_folder_moves_with_it(adapter, data, tmp_path, place, data_dir, write_rows):
    """A member's lies in its population's folder. What was copied out of its run takes nothing that lies beside."""
    was = "runs/x" if place == "run" else place
    settings = {"output_dir": was, "data_dir": data_dir, "eval_split": "dev"}
    change(adapter, result={"eval_split": "dev", "settings": settings})
    run = tmp_path / "moved" / place
    run.parent.mkdir(parents=True)
    adapter.parent.rename(run)
    beside = (run if place == "run" else tmp_path / "moved" / "ten") / "data"
    own = [{**ROWS[0], "premise": "It snows."}]
    write_rows(beside / "RTE" / "dev.jsonl", own)
    assert adapter_rows(run / "adapter", load_task("RTE")).rows == ROWS
    (run / "config.json").write_text("{}")
    assert adapter_rows(run / "adapter", load_task("RTE")).rows == own
    shutil.rmtree(beside)
    assert adapter_rows(run / "adapter", load_task("RTE")).rows == ROWS


def test_a_split_that_holds_other_rows_now_is_told(adapter, data, capsys, write_rows):
    task = load_task("RTE")
    rows = {"eval": adapter_rows(adapter, task).digest, "train": "0" * 64}
    settings = {"eval_split": "dev", "train_split": "other"}
    change(adapter, result={"eval_split": "dev", "settings": settings, "rows": rows})
    write_rows(data / "RTE" / "other.jsonl", ROWS)

    def told(**given) -> bool:
        adapter_rows(adapter, task, **given)
        return "holds other rows than the run of adapter" in capsys.readouterr().err

    assert not told()
    assert told(split="other")
    write_rows(data / "RTE" / "dev.jsonl", ROWS[:-1])
    assert told()
    assert not told(data_dir=str(data)), "rows that are given are the user's choice"
    for result in ({"eval_split": "dev"}, {"eval_split": "dev", "settings": settings, "rows": "x"}):
        change(adapter, result=result)
        assert not told(), "older cards don't say"


def test_data_of_the_demo_and_data_that_is_not_on_record(adapter, capsys):
    change(adapter, data={"data_dir": None, "dataset": None})
    assert len(adapter_rows(adapter, load_task("RTE"), "val").rows) == 64
    assert "doesn't say" not in capsys.readouterr().err
    change(adapter, data=None)
    assert len(adapter_rows(adapter, load_task("RTE"), "val").rows) == 64
    assert "doesn't say which data it was trained on; its score is on the packaged demo rows" in capsys.readouterr().err


def test_data_of_the_hub_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parquet").mkdir()
    assert data_record(RunConfig(dataset="owner/name")) == {"data_dir": None, "dataset": "owner/name"}
    assert data_record(RunConfig(dataset="parquet"))["dataset"] == str(tmp_path / "parquet")


@pytest.mark.parametrize("part", [{"data_dir": 3}, {"dataset": ["x"]}])
def test_cards_whose_data_is_no_text(adapter, part):
    change(adapter, data=part)
    with pytest.raises(ValueError, match=r"the card's data\w+ is .*; expected text or null\."):
        adapter_rows(adapter, load_task("RTE"))


def test_the_split_of_another_task_is_its_own(adapter):
    assert adapter_split(adapter, load_task("RTE")) == "dev"
    assert adapter_split(adapter, load_task("AX-b")) == "val"
    change(adapter, result={"eval_split": 3, "settings": {"max_length": "x"}})
    assert adapter_split(adapter, load_task("RTE")) == "val"
    assert trained_max_length(adapter) is None


def test_peft_s_own_adapters_name_their_model_and_head(adapter, model):
    (adapter / "ptp_ds.json").unlink()
    assert adapter_model(adapter, None) == str(model)
    assert adapter_model(adapter, "given") == "given"
    assert adapter_head(adapter) == "causal"
    assert serve([adapter], task="RTE").source.head_plan.kind == "causal"
    with pytest.raises(
        ValueError, match=r"which task it was trained on \(it has no ptp_ds\.json, as peft's own\); give"
    ):
        serve([adapter])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"doesn't say which model it was trained on; give --model\."):
        adapter_model(adapter, None)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(ValueError, match=r"is a classifier's, on a model of family 'llama'; .* on encoders alone"):
        serve([adapter], task="RTE")


def test_a_revision_of_peft_s_is_not_read_as_main(adapter, model):
    def says(**parts):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | parts))

    says(base_model_name_or_path="owner/name", revision="v2")
    assert adapter_model(adapter, None) == str(model), "our card names it"
    (adapter / "ptp_ds.json").unlink()
    with pytest.raises(
        ValueError, match="on revision 'v2' of owner/name, and a hub id is read at main; give --model a"
    ):
        adapter_model(adapter, None)
    assert adapter_model(adapter, "owner/name") == "owner/name"
    for parts in ({"revision": "main"}, {"revision": None}, {"base_model_name_or_path": str(model), "revision": "v2"}):
        says(**parts)
        assert adapter_model(adapter, None) in ("owner/name", str(model))


def test_folders_of_runs_and_of_nothing(adapter, tmp_path):
    assert adapter_folder(adapter) == adapter_folder(adapter.parent) == adapter
    with pytest.raises(ValueError, match=r"^Adapter nowhere: there is no such folder; give a run's folder, or an adap"):
        adapter_folder("nowhere")
    with pytest.raises(
        ValueError, match=r"elsewhere: no adapter_config\.json there; give a run's folder, or an adapter"
    ):
        adapter_folder(tmp_path / "elsewhere")
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "population.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several holds several prompts; give one of them, .*several/members/NAME\.$"):
        adapter_folder(tmp_path / "several")
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    (tmp_path / "early" / "config.json").write_text("{}")
    why = r"early: the run in that folder has written no adapter yet; let it end, --resume auto goes on with it"
    with pytest.raises(ValueError, match=why + r"\.$"):
        adapter_folder(tmp_path / "early")
    for step in (30, 231):
        (tmp_path / "early" / "checkpoints" / f"step-{step:06d}").mkdir()
    with pytest.raises(ValueError, match=why + r", and with --max_steps 231 it ends at its newest checkpoint\.$"):
        adapter_folder(tmp_path / "early")


@pytest.mark.parametrize("given", ["run", "adapter"])
def test_an_adapter_whose_run_has_gone_on_since(adapter, capsys, given):
    """A run that was resumed and stopped leaves the adapter of its end before."""
    change(adapter, result={"steps": 20})
    folder = adapter.parent if given == "run" else adapter
    for step in (20, 194):
        (adapter.parent / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        serve([folder])
        said = f"warning: adapter {adapter} is of step 20, and its run has gone on to step 194: let it end, or end it"
        assert capsys.readouterr().err.count(said) == (step == 194)
    adapter.rename(adapter.with_name("adapter.left"))
    serve([adapter.with_name("adapter.left")])
    assert "has gone on" not in capsys.readouterr().err, "a run that was left and one that took its place"
