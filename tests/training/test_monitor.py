"""log.jsonl after an interruption, and the learning rate's file of record."""

import json

import torch

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.monitor import Monitor, peak_memory_bytes

RANK0 = Ranks(0, 1, 0, torch.device("cpu"))
VALUES = {"loss": 1.0, "cross_entropy": 1.0, "divergence": 0.0, "grad_norm": 1.0, "learning_rate": 0.1,
          "step_seconds": 0.5, "tokens_per_second": 9.0}  # fmt: skip


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_resumed_log_has_every_step_once(tmp_path, capsys):
    first = Monitor(tmp_path, RANK0, 0, 6)
    for step in (1, 2, 3):
        first.train(step, VALUES)
    first.close()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # cut off by a kill
    second = Monitor(tmp_path, RANK0, 2, 6)
    second.train(3, VALUES)
    second.close()
    second.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert "step 3/6" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path, capsys):
    monitor = Monitor(tmp_path, Ranks(1, 2, 1, torch.device("cpu")), 0, 6)
    monitor.train(1, VALUES)
    monitor.tick(1)
    monitor.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 1e8 < peak_memory_bytes(torch.device("cpu")) < 1e11
