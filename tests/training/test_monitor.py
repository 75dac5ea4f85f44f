"""log.jsonl after an interruption, and the learning rate's file of record."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import OutputError, OutputGuard
from ptp_ds.training.evaluate import Evaluation
from ptp_ds.training.monitor import Monitor, peak_memory_bytes
from ptp_ds.training.population_monitor import PopulationMonitor

RANK0 = Ranks(0, 1, 0, torch.device("cpu"))
VALUES = {"loss": 1.0, "cross_entropy": 1.0, "divergence": 0.0, "grad_norm": 1.0, "learning_rate": 0.1,
          "step_seconds": 0.5, "tokens_per_second": 9.0}  # fmt: skip


def guard(folder):
    return OutputGuard(RANK0, folder)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_resumed_log_has_every_step_once(tmp_path, capsys):
    first = Monitor(tmp_path, RANK0, 0, 6)
    for step in (1, 2, 3):
        first.train(step, VALUES, guard(tmp_path))
    first.close()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # cut off by a kill
    second = Monitor(tmp_path, RANK0, 2, 6)
    second.train(3, VALUES, guard(tmp_path))
    second.close()
    second.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert "step 3/6" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, Ranks(1, 2, 1, torch.device("cpu")), 0, 6)
    monitor.train(1, VALUES, guard(tmp_path))
    monitor.tick(1)
    monitor.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_listeners_own_error_is_not_the_disks(tmp_path):
    """An OSError of its own, such as a web page that isn't there, passes; the disk's is told to the guard alone, and
    nobody hears of a line that isn't written."""
    told = []

    def listen(line):
        told.append(line)
        raise TimeoutError("no such page")

    monitor, output = Monitor(tmp_path, RANK0, 0, 6, listeners=[listen]), guard(tmp_path)
    with pytest.raises(TimeoutError, match="no such page"):
        monitor.evaluation(1, "select", {"accuracy": 0.5}, output)
    output.agree()
    assert told == [{"step": 1, "kind": "select", "accuracy": 0.5}]
    assert steps(tmp_path) == [1]
    with Path("/dev/full").open("w") as full:
        monitor._log = full
        monitor.evaluation(2, "select", {"accuracy": 0.5}, output)
        monitor._log = None
        with contextlib.suppress(OSError):
            full.close()
    assert len(told) == 1
    with pytest.raises(OutputError, match="No space left on device"):
        output.agree()


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 1e8 < peak_memory_bytes(torch.device("cpu")) < 1e11


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}, board


def test_a_resumed_board_has_every_step_once_that_of_the_checkpoint_too(tmp_path):
    first = Monitor(tmp_path, RANK0, 0, 6)
    for step in (1, 2, 3):
        first.train(step, {**VALUES, "loss": float(step)}, guard(tmp_path))
    first.close()
    second = Monitor(tmp_path, RANK0, 2, 6)
    second.train(3, {**VALUES, "loss": 30.0}, guard(tmp_path))
    second.close()
    assert scalars(tmp_path)[0]["train/loss"] == [1.0, 2.0, 30.0]


def test_a_run_that_starts_anew_keeps_nothing_of_one_that_saved_nothing(tmp_path):
    for value in (0.25, 0.5):
        monitor = Monitor(tmp_path, RANK0, 0, 6)
        monitor.evaluation(0, "untrained", {"accuracy": value}, guard(tmp_path))
        monitor.close()
    assert scalars(tmp_path)[0]["untrained/accuracy"] == [0.5]
    assert steps(tmp_path) == [0]


def test_a_population_has_means_with_their_band(tmp_path, capsys):
    monitor = PopulationMonitor(tmp_path, RANK0, 0, 6)
    monitor.train(2, [{**VALUES, "loss": loss} for loss in (1.0, 2.0, 6.0)])
    monitor.train(4, [{**VALUES, "loss": 5.0}])  # two have ended
    monitor.evaluation(4, "select", [Evaluation({}, score, 0.5, 0.5, 9) for score in (0.25, 0.75)])
    monitor.selected(4, [0.25, 0.75])
    monitor.ended(4, ["b"], ["c", "d"])
    monitor.train(6, [])
    monitor.close()
    monitor.close()
    found, board = scalars(tmp_path)
    spread = 7**0.5  # of 1, 2, 6 around 3
    assert found["members/train/loss/mean"] == [3.0, 5.0]
    assert found["members/train/loss/low"] == pytest.approx([3 - spread, 5.0])
    assert found["members/train/loss/high"] == pytest.approx([3 + spread, 5.0])
    assert found["members/alive"] == [3, 1]
    assert found["members/select/score/high"] == pytest.approx([0.5 + 0.125**0.5])
    assert "custom_scalars__config__" in board.Tags()["tensors"]
    told = capsys.readouterr().out
    assert "step 2/6  3 members  loss 3.0000 (1.0000 to 6.0000)  0.50 s/step  2 s left" in told
    assert "step 4  selection rows, prompts that are kept: score 0.500 (0.250 to 0.750)" in told
    assert "step 4  without a higher score for --patience evaluations, ended: b\n" in told
    assert "step 4  by a callback, ended: c, d\n" in told


def test_the_bar_of_a_population_shows_who_trains(tmp_path, monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    monitor = PopulationMonitor(tmp_path, RANK0, 0, 6)
    monitor.train(1, [VALUES, {**VALUES, "loss": 2.0}])
    monitor.tick(1, 2)
    monitor.close()
    assert "2 members, loss 1.5000" in shown.getvalue()
    assert not PopulationMonitor(tmp_path / "none", Ranks(1, 2, 1, torch.device("cpu")), 0, 6).close()
    assert not (tmp_path / "none").exists()
