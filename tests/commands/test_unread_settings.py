"""Settings that nothing reads are named, whichever way they came and whatever started the processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptp_ds.commands.plan import main as plan
from ptp_ds.commands.train import prepare
from ptp_ds.config.checks import describe_unread, unsuited, without_effect
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.runs import QUICK, check

FILE = """
from ptp_ds.perturb import Perturbation


def find(shared, row, clean_TH, settings, noise):
    return settings.unit * noise.uniform(row, clean_TH.shape[1])


PERTURBATION = Perturbation(find=find, sizes=(), reads=("mask_share",))
"""
SAID = "warning: --epsilon and --mask_share have no effect with --perturbation gaussian"
GIVEN = ["--perturbation", "gaussian", "--epsilon", "0.5", "--mask_share", "0.2"]


def by_torchrun(args: list[str], folder: Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *args]


def by_deepspeed(args: list[str], folder: Path) -> list[str]:
    (folder / "hosts").write_text("localhost slots=2\n")
    return [sys.executable, "-m", "ptp_ds.launch", "--hostfile", str(folder / "hosts"), *args]


def by_python(args: list[str], folder: Path) -> list[str]:
    return [sys.executable, *args]


@pytest.mark.slow
@pytest.mark.parametrize("command", [by_python, by_torchrun, by_deepspeed])
def test_every_launcher_lets_it_through_once(command, tiny_model, tmp_path):
    script = [str(ROOT / "scripts" / "train.py"), "--ds_config", str(ROOT / "ds_configs" / "zero3.json")]
    args = [*script, *QUICK, *GIVEN, "--model", str(tiny_model), "--max_steps", "1", "--output_dir", "out"]
    done = check(subprocess.run(
        command(args, tmp_path), env=child_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=170,
        check=False,
    ))  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "no effect" in line] == [SAID]
    assert "no effect" not in done.stdout


@pytest.fixture
def said(tiny_model, tmp_path, monkeypatch, capsys):
    """said(argv) prepares a run and returns what it says on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(argv: list[str]) -> list[str]:
        prepare(*parse_run(["--model", str(tiny_model), "--task", "CB", "--prompt_length", "4", *argv]))
        return capsys.readouterr().err.splitlines()

    return run


def test_flags_and_config_files_say_it(said, tmp_path):
    assert said(GIVEN) == [SAID]
    (tmp_path / "run.json").write_text(json.dumps({"perturbation": "gaussian", "epsilon": 0.5, "mask_share": 0.2}))
    assert said(["--config", "run.json"]) == [SAID]
    assert said(["--perturbation", "none", "--sigma", "0.1", "--epsilon", "0.5", "--mask_share", "0.2"]) == [
        "warning: --epsilon, --mask_share and --sigma have no effect with --perturbation none"
    ]


def test_a_python_caller_hears_it_without_telling_what_was_given(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(RunConfig(model=str(tiny_model), task="CB", prompt_length=4, epsilon=0.5, mask_share=0.2))
    assert capsys.readouterr().err.splitlines() == [SAID]


def test_what_a_preset_sets_for_another_perturbation_is_named(said):
    assert said(["--preset", "smart", "--perturbation", "gaussian", "--mask_share", "0.2"]) == [
        "warning: alpha, ascent_steps, epsilon and norm of --preset smart have no effect with --perturbation gaussian",
        "warning: --mask_share has no effect with --perturbation gaussian",
    ]
    assert said(["--preset", "smart"]) == []


def test_what_a_perturbation_file_may_read_is_not_called_unread(tmp_path):
    """find is given units (as settings.unit) and target (the row's movable tokens), whatever flags it names."""
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    run = RunConfig(perturbation=str(file), target="both", units="l2", epsilon=0.5)
    assert without_effect(run, set()) == ["epsilon"]
    assert describe_unread(run, set()) == [f"--epsilon has no effect with --perturbation {file}"]


def test_a_file_turned_off_by_a_parameter_of_its_own(tmp_path):
    file = tmp_path / "mine.py"
    own = "from ptp_ds.perturb import Parameter\nPERTURBATION = Perturbation(find=find, sizes=('width',), "
    file.write_text(FILE.split("PERTURBATION")[0] + own + "parameters={'width': Parameter(0.0, 'how far')})\n")
    assert describe_unread(RunConfig(perturbation=str(file)), {"epsilon", "reg_weight"}) == [
        f"--epsilon and --reg_weight have no effect with a --perturbation {file} of size 0"
    ]


def test_settings_beside_the_perturbation():
    assert describe_unread(RunConfig(divergence="ce", divergence_gradient="both"), set()) == [
        "--divergence_gradient has no effect with --divergence ce"
    ]
    run = RunConfig(lr_schedule="constant", schedule_steps=90, select_split="dev", holdout=0.3, tokens_per_step=64)
    assert describe_unread(run, {"batch_size"}) == [
        "--batch_size has no effect with --tokens_per_step",
        "--holdout has no effect with --select_split",
        "--schedule_steps has no effect with --lr_schedule constant",
    ]


def test_steps_at_a_rate_of_zero_are_named():
    said = ["--schedule_steps 20 ends before --max_steps 30: the learning rate is 0 in the last 10 steps, which train "
            "nothing; give --schedule_steps 30 or more"]  # fmt: skip
    assert unsuited(RunConfig(max_steps=30, schedule_steps=20), set()) == said
    assert unsuited(RunConfig(max_steps=30, schedule_steps=20, lr_schedule="constant"), set()) == []
    assert unsuited(RunConfig(max_steps=30, schedule_steps=30), set()) == []


def test_plan_says_it_too(capsys):
    assert plan(["--model", "llama-8b", "--hosts", "1", "--gpus", "8", "--gpu_memory", "80", *GIVEN]) == 0
    assert capsys.readouterr().err.splitlines() == [SAID]
