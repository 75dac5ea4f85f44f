"""--report_to: what trackers are told, by a stand-in among accelerate's classes; what is refused; what is survived."""

import json
import sys

import pytest
from accelerate import tracking
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.redact import HIDDEN
from ptp_ds.training.trackers import (
    BUILT_IN,
    NONE,
    Trackers,
    of_member,
    report_names,
    require_trackers,
    shared_settings,
    told_settings,
)
from tests.support.paths import ROOT
from tests.support.runs import QUICK, check, last_prompt
from tests.support.zygote import run_script

WORKER = ROOT / "tests" / "support" / "tracked_train.py"


class Standin(GeneralTracker):
    """Keeps what it is told, in one list for all; raises at the call that `fails` names. Decorated as accelerate's."""

    name, requires_logging_directory = "standin", True
    told: list = []  # noqa: RUF012
    fails = ""

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.tell("made", run_name, logging_dir)

    @property
    def tracker(self):
        return self

    def tell(self, what, *arguments):
        tracking.logger.debug("accelerate's own trackers log at every call")
        self.told.append((what, *arguments))
        if what == self.fails:
            raise ConnectionError("the network is down")

    @on_main_process
    def start(self):
        self.tell("start", list(sys.argv))

    @on_main_process
    def store_init_configuration(self, values):
        self.tell("settings", values)

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.tell("log", values, step)

    @on_main_process
    def finish(self):
        self.tell("finish")


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "standin", Standin)
    monkeypatch.setattr(Standin, "told", [])
    monkeypatch.setattr(Standin, "fails", "")
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a process that never had one
    return Standin


def test_the_names_are_those_that_accelerate_knows():
    assert set(BUILT_IN) == set(tracking.LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(
    ("given", "names"),
    [("tensorboard", ("tensorboard",)), ("none", ()), ("wandb,mlflow", ("wandb", "mlflow")),
     (" mlflow, tensorboard mlflow ", ("mlflow", "tensorboard"))],
)  # fmt: skip
def test_lists_of_trackers(given, names):
    assert report_names(given) == names
    assert of_member(given) == ("tensorboard" if "tensorboard" in names else NONE)


def test_the_flag_takes_words_and_commas():
    assert parse_run(["--report_to", "mlflow", "tensorboard"])[0].report_to == "mlflow tensorboard"
    assert parse_run(["--report_to", "mlflow,tensorboard"])[0].report_to == "mlflow,tensorboard"
    assert RunConfig().report_to == "tensorboard"


@pytest.mark.parametrize(
    ("given", "message"),
    [("wandbb", r"--report_to 'wandbb' is no tracker \(did you mean 'wandb'\?\); expected one or several of tensorbo"),
     ("", "--report_to is ''; expected one or several of"), ("none wandb", "or none alone")],
)  # fmt: skip
def test_what_is_no_list_of_trackers_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        require_trackers(given)


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("aim", "'aim<4'")])
def test_a_package_that_is_absent_is_refused(monkeypatch, name, package):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(UserError, match=f"--report_to {name} needs a package .*; pip install {package}, or leave"):
        require_trackers(f"tensorboard {name}")
    require_trackers("tensorboard")


def test_trackers_are_told_what_differs_from_the_defaults():
    run = RunConfig(task="CB", perturbation="pgd", lr=0.1, max_length=64, average=0.5, report_to="none", resume="auto")
    assert told_settings(run) == {"task": "CB", "model": run.model, "perturbation": "pgd", "seed": 0, "lr": 0.1,
                                  "max_length": 64, "average": 0.5}  # fmt: skip


def test_members_are_told_as_one():
    told = shared_settings([RunConfig(seed=1, lr=0.1), RunConfig(seed=2), RunConfig(seed=3)])
    assert told == {"members": 3, "task": "Reviews", "model": RunConfig().model, "perturbation": "gaussian",
                    "seed": "1, 2, 3", "lr": "0.1, 0.03, 0.03"}  # fmt: skip


def test_a_tracker_gets_settings_values_and_an_end_without_accelerates_state(standin, tmp_path):
    logger, trackers = tracking.logger, Trackers(["standin"], tmp_path / "run", {"lr": 0.1}, continues=False)
    trackers.log({"train/loss": 1.5}, 2)
    trackers.close()
    trackers.close()
    assert standin.told == [
        ("made", "run", str(tmp_path / "run")), ("start", sys.argv), ("settings", {"lr": 0.1}),
        ("log", {"train/loss": 1.5}, 2), ("finish",),
    ]  # fmt: skip
    assert PartialState._shared_state == {}
    assert tracking.logger is logger


@pytest.mark.parametrize("fails", ["made", "start", "settings", "log", "finish"])
def test_one_that_raises_is_left_out_with_one_warning(standin, monkeypatch, tmp_path, capsys, fails):
    monkeypatch.setattr(standin, "fails", fails)
    trackers = Trackers(["standin"], tmp_path, {}, continues=False)
    for step in (1, 2):
        trackers.log({"train/loss": 1.0}, step)
    trackers.close()
    assert standin.told[-1][0] == fails
    assert len([one for one in standin.told if one[0] == fails]) == 1
    warning = "warning: --report_to standin failed (ConnectionError: the network is down); the run goes on without it\n"
    assert capsys.readouterr().err == warning


def test_no_secret_is_told(standin, monkeypatch, tmp_path, capsys):
    secret = "abcdefgh12345"
    monkeypatch.setenv("MY_TOKEN", secret)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", f"hub/{secret}"])
    monkeypatch.setattr(standin, "fails", "finish")
    settings = told_settings(RunConfig(model=f"hub/{secret}", output_dir=f"runs/{secret}"))
    trackers = Trackers(["standin"], tmp_path / f"run-{secret}", settings, continues=False)
    trackers.close()
    told = {what: arguments for what, *arguments in standin.told}
    assert told["made"][0] == f"run-{HIDDEN}"
    assert told["start"] == [["train.py", "--model", f"hub/{HIDDEN}"]]
    assert told["settings"][0]["model"] == f"hub/{HIDDEN}"
    assert secret not in repr(told["settings"]) + capsys.readouterr().err
    assert sys.argv[-1] == f"hub/{secret}"


def run(tmp_path, name, *args, ranks=1):
    """A whole run by tests/support/tracked_train.py, which registers `diary` and `broken`; its folder and the diary."""
    out = tmp_path / name
    done = check(run_script(WORKER, [*QUICK, "--max_steps", "2", "--output_dir", out, *args], tmp_path, ranks))
    diaries = sorted(tmp_path.glob(f"diary-{name}-*.jsonl"))
    told = [[json.loads(line) for line in file.read_text().splitlines()] for file in diaries]
    return out, done, told


@pytest.mark.slow
def test_a_run_on_two_ranks_tells_its_tracker_all_and_another_that_breaks_changes_nothing(tiny_model, tmp_path):
    """The same prompt to the bit as by `none`, which leaves no tensorboard folder; rank 0 alone has a diary."""
    flags = ["--model", tiny_model, "--perturbation", "pgd", "--lr", "0.1"]
    quiet, done, told = run(tmp_path, "quiet", *flags, "--report_to", "none", ranks=2)
    assert told == []
    assert not (quiet / "tensorboard").exists()
    assert "tensorboard" not in done.stdout
    out, done, told = run(tmp_path, "run", *flags, "--report_to", "diary,broken", "tensorboard", ranks=2)
    assert done.stderr.count("--report_to broken failed (ConnectionError") == 1
    assert (last_prompt(out) == last_prompt(quiet)).all()
    assert len(told) == 1
    assert [entry["what"] for entry in told[0]][:2] == ["start", "settings"]
    assert told[0][-1] == {"what": "finish", "state": {}}
    settings = told[0][1]["values"]
    assert settings.items() >= {"task": "COPA", "perturbation": "pgd", "lr": 0.1, "seed": 0, "max_steps": 2}.items()
    assert "sigma" not in settings
    values = {(tag, entry["step"]): value for entry in told[0] if entry["what"] == "log"
              for tag, value in entry["values"].items()}  # fmt: skip
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    wanted = {(f"{line['kind']}/{name}", line["step"]): value for line in lines for name, value in line.items()
              if name not in ("kind", "step")}  # fmt: skip
    assert values == wanted
    assert {("train/loss", 1), ("train/loss", 2), ("untrained/accuracy", 0), ("eval/accuracy", 2)} <= set(values)
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {event.step for event in board.Scalars("train/loss")} == {1, 2}
    assert hparams(board) == {name: pytest.approx(value) for name, value in settings.items()}
    assert board.Scalars("hparam/accuracy")[0].value == pytest.approx(values["eval/accuracy", 2])


def hparams(board):
    """What TensorBoard's page of hyper-parameters shows of a run."""
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    held = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in held.items()}


def test_a_population_is_one_run_of_a_tracker(tiny_model, tmp_path):
    flags = ["--model", tiny_model, "--seeds", "0-1", "--report_to"]
    out, _, told = run(tmp_path, "both", *flags, "diary")
    assert len(told) == 1
    assert told[0][1]["values"].items() >= {"members": 2, "seed": "0, 1"}.items()
    last = next(entry for entry in reversed(told[0]) if entry["what"] == "log")
    scores = [json.loads((out / "members" / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    mean = sum(score["eval_cross_entropy"] for score in scores) / 2
    assert last["values"]["members/eval/cross_entropy/mean"] == pytest.approx(mean)
    assert not list(out.rglob("tensorboard"))


def test_a_resumed_run_keeps_its_name(tiny_model, tmp_path):
    flags = ["--model", tiny_model, "--report_to", "diary", "--save_every", "1"]
    run(tmp_path, "run", *flags)
    _, _, told = run(tmp_path, "run", *flags, "--max_steps", "3", "--resume", "auto")
    assert [entry["name"] for entry in told[0] if entry["what"] == "start"] == ["run", "run"]
    steps = [entry["step"] for entry in told[0] if entry["what"] == "log" and "train/loss" in entry["values"]]
    assert steps == [1, 2, 3]


def test_an_unknown_tracker_ends_a_run_before_anything_is_loaded(tmp_path, run_train):
    done = run_train(["--report_to", "wandbb", "--model", "nowhere", "--output_dir", tmp_path / "run"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: --report_to 'wandbb' is no tracker (did you mean 'wandb'?)")
    assert not (tmp_path / "run").exists()
