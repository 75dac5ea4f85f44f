"""--report_to: what a tracker receives, and what it can't do to a run."""

import importlib.machinery
import json
import sys
import types

import pytest
from accelerate import tracking

from ptp_ds import choices
from ptp_ds.commands.train import train
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.training.trackers import require_installed, trackers_of

SETTINGS = {"task": "COPA", "prompt_length": 4, "batch_size": 4, "max_steps": 3, "eval_tokens": 600, "log_every": 1}


@pytest.fixture
def told(monkeypatch):
    """What a stand-in for wandb was told; it raises in the step that `told["fails_in"]` names."""
    told: dict = {"config": [], "lines": [], "finished": 0, "named": [], "fails_in": None}

    class StandIn(tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False
        main_process_only = True

        @tracking.on_main_process
        def __init__(self, run_name):
            super().__init__()
            told["named"].append(run_name)

        @property
        def tracker(self):
            return self

        @tracking.on_main_process
        def store_init_configuration(self, values):
            told["config"].append(values)
            tracking.logger.debug("stored")

        @tracking.on_main_process
        def log(self, values, step=None, **kwargs):
            if step == told["fails_in"]:
                raise ConnectionError("no route to the service")
            told["lines"].append((step, values))

        @tracking.on_main_process
        def finish(self):
            told["finished"] += 1

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", StandIn)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_the_names_are_accelerates():
    assert set(choices.TRACKERS) == {str(getattr(key, "value", key)) for key in tracking.LOGGER_TYPE_TO_CLASS}
    assert trackers_of("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
    assert trackers_of("none") == ()


def test_a_tracker_receives_settings_scalars_and_an_end(told, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_12345678")
    run = RunConfig(**SETTINGS, model=str(tiny_model), report_to="tensorboard,wandb", output_dir=str(tmp_path / "mine"),
                    lr=0.1, init_text="hf_12345678", prompt_init="text")  # fmt: skip
    assert train(run) == 0
    assert told["named"] == ["mine"]
    (config,) = told["config"]
    assert (config["task"], config["perturbation"], config["seed"], config["lr"]) == ("COPA", "gaussian", 0, 0.1)
    assert config["init_text"] == "[secret]"
    assert "weight_decay" not in config
    lines = [json.loads(line) for line in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    wanted = [(line["step"], {f"{line['kind']}/{name}": value for name, value in line.items()
                              if name not in ("step", "kind")}) for line in lines]  # fmt: skip
    assert told["lines"] == wanted
    assert told["finished"] == 1
    assert list((tmp_path / "mine" / "tensorboard").iterdir())


def test_one_that_fails_is_left_out_and_the_run_goes_on(told, tiny_model, tmp_path, capsys):
    told["fails_in"] = 2
    run = RunConfig(**SETTINGS, model=str(tiny_model), report_to="wandb", output_dir=str(tmp_path / "mine"))
    assert train(run) == 0
    assert (tmp_path / "mine" / "result.json").is_file()
    assert [step for step, _ in told["lines"]] == [0, 1]
    err = capsys.readouterr().err
    assert err.count("warning: tracker wandb is left out: no route to the service") == 1
    assert not (tmp_path / "mine" / "tensorboard").exists()


def test_of_several_prompts_a_tracker_receives_the_means(told, tiny_model, tmp_path):
    run = RunConfig(**SETTINGS, model=str(tiny_model), seeds="0-1", report_to="wandb,tensorboard",
                    output_dir=str(tmp_path / "all"))  # fmt: skip
    assert train(run) == 0
    assert told["named"] == ["all"]
    assert told["config"][0]["members"] == 2
    losses = [values["members/train/loss/mean"] for _, values in told["lines"] if "members/train/loss/mean" in values]
    of_each = []
    for member in ("seed-0", "seed-1"):
        lines = map(json.loads, (tmp_path / "all" / "members" / member / "log.jsonl").read_text().splitlines())
        of_each.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert losses == pytest.approx([sum(pair) / 2 for pair in zip(*of_each, strict=True)])


def test_none_writes_no_scalars(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = RunConfig(**SETTINGS, model=str(tiny_model), report_to="none", output_dir=str(tmp_path / "mine"))
    assert train(run) == 0
    assert not (tmp_path / "mine" / "tensorboard").exists()
    assert (tmp_path / "mine" / "log.jsonl").is_file()


def test_hparams_of_a_run_are_on_record(tiny_model, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = RunConfig(**SETTINGS, model=str(tiny_model), output_dir=str(tmp_path / "mine"))
    assert train(run) == 0
    events = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert events.Scalars("hparam/accuracy")[-1].value == pytest.approx(result["metrics"]["accuracy"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("wandbb", r"--report_to 'wandbb' \(did you mean 'wandb'\?\): choose from none, tensorboard"),
     ("none,wandb", "--report_to is 'none,wandb'; expected none, or names"), ("", "--report_to is ''; expected none")],
)  # fmt: skip
def test_names_that_are_none(text, said):
    with pytest.raises(UserError, match=said):
        parse_run(["--report_to", text])


def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(UserError, match="--report_to swanlab needs its package: run `pip install swanlab`"):
        require_installed("tensorboard,swanlab")
