"""What a person sees of a run: ten lines before the first step, in order, and nothing of launchers and libraries."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import child_environment, worker_environment
from tests.support.runs import QUICK, check
from tests.support.zygote import run_script

SCRIPT = ROOT / "scripts" / "train.py"
START = [
    r"COPA on \S+: llama of 37792 parameters in fp32, predicts by causal",
    r"  ranks: 2 on cpu, ZeRO-3",
    r"  rows: 82 train, 14 selection, 48 evaluation; none shortened",
    r"  steps: 2 of 4 rows \(2 a rank\), 0\.1 epochs",
    r"  perturbation: pgd, epsilon 0\.1, alpha 0\.075, ascent_steps 2, norm frobenius \(in mean embedding norms\); "
    r"divergence kl, the clean prediction fixed, lambda 1",
    r"  prompt: soft, 5 tokens, starts as vocabulary rows",
    r"  auto: train_batch_size 4, .*, precision fp32 \(no GPU here; .*\), reduce_bucket_size 1024, .*",
    r"  shards: one memory that the 2 ranks of this host share; nothing is sent",
    r"  activations: keep up to \d+ tokens a step .*; kernels: torch \(.*\); frozen products: .*; fused layers: .*",
    r"  output: \S+run",
    r"  untrained prompt: accuracy \d\.\d+",
    r"step 1/2  loss \d.*  0 s left",
    r"step 2/2  loss \d.*",
    r"step 2  selection rows \(14\): accuracy .*",
    r"",
    r"COPA val \(48 rows, prompt of step 2\): accuracy .*  \|  untrained prompt: accuracy .*  \|  majority class: .*",
    r"adapter, result\.json and logs: \S+run",
    r"scalars: tensorboard --logdir \S+run/tensorboard",
]


def launched(tmp_path: Path, args: list) -> subprocess.CompletedProcess:
    """Two ranks by the `deepspeed` command."""
    command = [sys.executable, "-m", "ptp_ds.launch", "--hostfile", ROOT / "hostfiles" / "local", SCRIPT, *args]
    return subprocess.run(list(map(str, command)), env=worker_environment(), cwd=tmp_path, capture_output=True,
                          text=True, timeout=170, check=False)  # fmt: skip


def by_forks(tmp_path: Path, args: list) -> subprocess.CompletedProcess:
    """Two ranks without a launcher's time."""
    return run_script("train.py", args, tmp_path, ranks=2)


@pytest.mark.parametrize("start", [by_forks, pytest.param(launched, marks=pytest.mark.slow)])
def test_two_ranks_say_what_a_person_needs_in_order(start, tmp_path, tiny_model):
    args = [*QUICK, "--model", tiny_model, "--perturbation", "pgd", "--max_steps", "2"]
    done = check(start(tmp_path, [*args, "--output_dir", tmp_path / "run"]))
    found = done.stdout.removesuffix("\n").split("\n")
    for line, wanted in zip(found, START, strict=True):
        assert re.fullmatch(wanted, line), (wanted, line)
    assert done.stderr == ""


@pytest.mark.slow
def test_a_users_error_is_the_only_line_of_the_deepspeed_command(tmp_path, tiny_model):
    done = launched(tmp_path, [*QUICK, "--model", tiny_model, "--sigma", "-1"])
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "error: --sigma is -1.0; expected a finite number of 0 or more.\n")


def test_a_malformed_hostfile_is_one_line(tmp_path):
    (tmp_path / "hosts").write_text("worker-1 slot=2\n")
    command = [sys.executable, "-m", "ptp_ds.launch", "--hostfile", str(tmp_path / "hosts"), str(SCRIPT)]
    done = subprocess.run(command, env=worker_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: Hostfile contains a bad entry: worker-1 slot=2")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (["--task", "CB", "--perturbation", "none", "--prompt", "deep", "--prompt_init", "labels"],
         [r"  perturbation: none", r"  prompt: deep, 5 tokens, starts as the class words"]),
        (["--sigma", "0", "--tokens_per_step", "900", "--prompt_mlp", "8"],
         [r"  steps: 1 of 900 tokens over all ranks",
          r"  perturbation: none \(gaussian is off, by a size or a lambda of 0\)",
          r"  prompt: soft, 5 tokens, starts as vocabulary rows, through an MLP of 8"]),
        (["--task", "CB", "--perturbation", "none", "--prompt_init", "text"],
         [r"  prompt: soft, 5 tokens, starts as 'Say whether each text makes .* True, False or Neither\.'"]),
        (["--task", "CB", "--prompt_length", "450", "--gradient_accumulation_steps", "2", "--preset", "r3f"],
         [r"  rows: 82 train, 14 selection, 48 evaluation; \d+ of them longer than the context, shortened in 'premise'",
          r"  steps: 1 of 4 rows \(in 2 micro-batches\), 0\.0 epochs", r"  preset r3f: .*",
          r"  perturbation: uniform, sigma 5\.77e-06 \(a coordinate\); divergence sym_kl, lambda 1"]),
    ],
)  # fmt: skip
def test_other_runs_are_told_as_they_are(run_train, tiny_model, tmp_path, extra, wanted):
    done = check(
        run_train([*QUICK, "--model", tiny_model, "--max_steps", "1", "--output_dir", tmp_path / "run", *extra])
    )
    lines = done.stdout.split("\n")
    for line in wanted:
        assert any(re.fullmatch(line, found) for found in lines), (line, done.stdout)


def test_rows_that_no_prompt_can_get_right_are_told(run_train, tiny_model, write_rows, tmp_path):
    """By the run and by ptp evaluate: COPA's row 3 of both splits has one choice twice."""
    row = {"premise": "It was", "question": "cause", "choice1": "Warm.", "choice2": "Cold.", "label": 1}
    rows = [row, row, {**row, "choice2": row["choice1"]}, row]
    for split in ("train", "val"):
        write_rows(tmp_path / "data" / "COPA" / f"{split}.jsonl", rows)
    run = ["--task", "COPA", "--data_dir", tmp_path / "data", "--model", tiny_model, "--max_steps", "1",
           "--prompt_length", "5", "--batch_size", "2", "--output_dir", tmp_path / "run"]  # fmt: skip
    done = check(run_train(run))
    told = re.search(r"^  rows: .*; none shortened; (\d) with a right and a wrong answer of the same tokens \((.*)\)$",
                     done.stdout, re.MULTILINE)  # fmt: skip
    assert told is not None, done.stdout
    assert told[1] == "2"
    assert re.findall(r"(\w+)\.jsonl:(\d+)", told[2]) == [("train", "3"), ("val", "3")]
    scored = run_script("evaluate.py", ["--adapter", tmp_path / "run"], tmp_path)
    assert "1 row has a right and a wrong answer of the same tokens (" in check(scored).stderr


@pytest.mark.slow
def test_on_a_terminal_loss_lines_stand_above_the_bar(tiny_model, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 110))  # tqdm draws nothing on a terminal without rows
    command = [
        sys.executable,
        SCRIPT,
        *QUICK,
        "--model",
        tiny_model,
        "--max_steps",
        "3",
        "--output_dir",
        tmp_path / "run",
    ]
    with subprocess.Popen(list(map(str, command)), env=child_environment(), cwd=tmp_path, stdin=theirs, stdout=theirs,
                          stderr=theirs) as run:  # fmt: skip
        os.close(theirs)
        seen = b""
        while part := _read(ours):
            seen += part
        assert run.wait(60) == 0
    os.close(ours)
    shown = re.split(r"[\r\n]+", seen.decode())
    assert [line[:8] for line in shown if re.match(r"step \d/3  loss \d.* left$", line)] == [
        "step 1/3", "step 2/3", "step 3/3",
    ]  # fmt: skip
    assert any("| 1/3 [" in line and "step/s]" in line for line in shown)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux ends a terminal whose other side is closed
        return b""
