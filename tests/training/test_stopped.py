"""A run that a signal stopped may end where it is, as one would that was so long from the start."""

import os
import signal

import pytest
import torch

import ptp_ds
from ptp_ds.adapters.read import adapter_folder
from ptp_ds.errors import UserError
from ptp_ds.training.checkpoint import saved_steps
from tests.support.runs import adapter

pytestmark = pytest.mark.usefixtures("no_launcher")

QUICK = {"task": "COPA", "prompt_length": 4, "batch_size": 4, "eval_tokens": 600, "lr": 0.1, "verbose": False,
         "log_every": 1, "save_every": 0, "lr_schedule": "constant", "perturbation": "free"}  # fmt: skip


def scored_at(folder) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [int(line.split('"step": ')[1].split(",")[0]) for line in lines if '"select"' in line]


@pytest.mark.parametrize(
    ("eval_every", "seeds"),
    [
        (0, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, "0-1"), (2, None), (0, "0-1")]),
    ],
)  # fmt: skip
def test_it_ends_where_it_was_stopped(tiny_model, tmp_path, seeds, eval_every):
    """eval_every 0: nothing has been scored by then. 2: another step has, and the last one is scored, too."""
    given = {**QUICK, "model": str(tiny_model), "eval_every": eval_every, "seeds": seeds}
    stopped, out = tmp_path / "stopped", tmp_path / "whole"
    part = "." if seeds is None else "members/seed-1"

    def stop(line: dict) -> None:
        if line["kind"] == "train" and line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        ptp_ds.train(**given, max_steps=50, output_dir=stopped, callbacks=[stop])
    (step,) = saved_steps(stopped / part / "checkpoints")
    with pytest.raises(UserError, match=f"goes on with it, and with --max_steps {step} it ends at its newest checkpoi"):
        adapter_folder(stopped / part)
    few = rf"--max_steps is 1 and .* has {step} steps behind it; give --max_steps {step} to end it there, or more"
    with pytest.raises(UserError, match=few + r"\.$"):
        ptp_ds.train(**given, max_steps=1, output_dir=stopped, resume="auto")

    ptp_ds.train(**given, max_steps=step, output_dir=stopped, resume="auto")
    ptp_ds.train(**given, max_steps=step, output_dir=out)
    assert torch.equal(adapter(stopped / part), adapter(out / part))
    assert scored_at(stopped / part) == scored_at(out / part)
    assert scored_at(out / part)[-1] == step
    with pytest.raises(UserError, match=few + rf", or score the adapter in .*{stopped.name}.* by `ptp evaluate`\.$"):
        ptp_ds.train(**given, max_steps=1, output_dir=stopped, resume="auto")

    ptp_ds.train(**given, max_steps=step, output_dir=stopped, resume="auto")
    assert scored_at(stopped / part)[-1] == step
    assert len(set(scored_at(stopped / part))) == len(scored_at(stopped / part)), "what has ended is not scored again"
    for folder in (stopped, out):
        ptp_ds.train(**given, max_steps=step + 2, output_dir=folder, resume="auto")
    assert torch.equal(adapter(stopped / part), adapter(out / part))


@pytest.mark.parametrize("seeds", [pytest.param(None, marks=pytest.mark.slow), "0-1"])
def test_an_end_that_other_evaluations_would_have_scored(tiny_model, tmp_path, seeds):
    """Step 3, stopped where every second one is scored, is scored where it shall be the end of a run that scores every
    third; and only once."""
    given = {**QUICK, "model": str(tiny_model), "seeds": seeds, "output_dir": tmp_path / "run"}
    folder = tmp_path / "run" / ("." if seeds is None else "members/seed-1")

    def stop(line: dict) -> None:
        if line["kind"] == "train" and line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        ptp_ds.train(**given, max_steps=50, eval_every=2, callbacks=[stop])
    assert (saved_steps(folder / "checkpoints"), scored_at(folder)) == ([3], [2])
    for _ in range(2):
        ptp_ds.train(**given, max_steps=3, eval_every=3, resume="auto")
        assert scored_at(folder) == [2, 3]
