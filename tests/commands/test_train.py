"""Whole runs of scripts/train.py on a tiny model: records, invariants 1, 4 and 6, faults."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.runs import QUICK, adapter, check, last_prompt
from tests.support.zygote import run_script


def test_no_perturbation_zero_lambda_and_zero_noise_are_plain_prompt_tuning(run_train, tiny_model, tmp_path):
    variants = {
        "none": ["--perturbation", "none"],
        "lambda": ["--perturbation", "pgd", "--reg_weight", "0"],
        "sigma": ["--perturbation", "gaussian", "--sigma", "0"],
        "noisy": ["--perturbation", "gaussian", "--sigma", "1"],
    }
    prompts = {}
    for name, extra in variants.items():
        out = tmp_path / name
        check(run_train([*QUICK, "--model", tiny_model, "--max_steps", "3", "--output_dir", out, *extra]))
        prompts[name] = last_prompt(out)
    assert torch.equal(prompts["none"], prompts["lambda"])
    assert torch.equal(prompts["none"], prompts["sigma"])
    assert not torch.equal(prompts["none"], prompts["noisy"])


def test_records(run_train, tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    args = [
        *QUICK,
        "--model",
        tiny_model,
        "--task",
        "CB",
        "--max_steps",
        "4",
        "--eval_every",
        "2",
        "--perturbation",
        "pgd",
    ]
    done = check(run_train([*args, "--output_dir", out]))
    result = json.loads((out / "result.json").read_text())
    wanted = {"task", "model", "perturbation", "prompt", "seed", "world_size", "steps", "metrics", "majority",
              "step_seconds_median", "tokens_per_second", "peak_memory_bytes"}  # fmt: skip
    assert wanted <= result.keys()
    assert (result["task"], result["steps"], result["world_size"]) == ("CB", 4, 1)
    assert set(result["metrics"]) == {"accuracy", "macro_f1"}
    assert result["untrained"].keys() == result["metrics"].keys()
    shown = f"untrained prompt: accuracy {result['untrained']['accuracy']:.3f}"
    assert done.stdout.count(shown) == 2  # before training, and beside the result
    assert "majority class" in done.stdout
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["kind"] == "select"] == [2, 4]
    assert [line["step"] for line in lines if line["kind"] == "untrained"] == [0]
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    scalars = set(board.Tags()["scalars"])
    train = {"loss", "cross_entropy", "divergence", "delta_norm", "prompt_norm", "grad_norm", "learning_rate",
             "tokens_per_second", "peak_memory_bytes"}  # fmt: skip
    assert {f"train/{name}" for name in train} | {"select/accuracy", "eval/accuracy", "eval/macro_f1"} <= scalars
    logged = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert {e.step: pytest.approx(e.value, rel=1e-5) for e in board.Scalars("train/loss")} == logged
    config = json.loads((out / "config.json").read_text())
    assert config["run"]["perturbation"] == "pgd"
    assert config["deepspeed"]["zero_optimization"]["stage"] == 3
    assert config["versions"]["torch"] == torch.__version__
    assert len(config["training_data_sha256"]) == 64


def start(args: list, tmp_path: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *map(str, args)]
    return subprocess.Popen(
        command, env=child_environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(run_train, tiny_model, tmp_path):
    args = [*QUICK, "--model", tiny_model, "--perturbation", "pgd", "--max_steps", "30", "--save_every", "5",
            "--eval_every", "10", "--weight_decay", "0.01"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    check(run_train([*args, "--output_dir", whole]))
    process = start([*args, "--output_dir", broken], tmp_path)
    wait_for(broken / "checkpoints" / "step-000010", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "result.json").exists()
    done = check(run_train([*args, "--output_dir", broken, "--resume", "auto"]))
    assert "resumed behind step" in done.stdout
    assert torch.equal(last_prompt(broken), last_prompt(whole))
    assert torch.equal(adapter(broken), adapter(whole))
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
         if line["kind"] == "train"} for out in (whole, broken)
    ]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("perturbation", [pytest.param("gaussian", marks=pytest.mark.slow), "free"])
def test_saved_on_two_ranks_resumes_on_one(run_train, tiny_model, tmp_path, perturbation):
    """P * H is odd here, so the last rank's part of the prompt is padded; free (K = 2) stops between a batch's uses."""
    args = [*QUICK, "--model", tiny_model, "--perturbation", perturbation, "--max_steps", "6", "--save_every", "3",
            "--keep_checkpoints", "5", "--lr", "0.01"]  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"
    check(run_train([*args, "--output_dir", two], nproc=2))
    saved = two / "checkpoints" / "step-000003"
    check(run_train([*args, "--output_dir", one, "--resume", saved]))
    difference = (last_prompt(one) - last_prompt(two)).norm() / last_prompt(two).norm()
    assert float(difference) < 1e-5
    assert json.loads((one / "result.json").read_text())["world_size"] == 1


@pytest.mark.slow
def test_an_extended_run_equals_one_that_was_as_long_from_the_start(run_train, tiny_model, tmp_path):
    """Its schedule's end was known beforehand: four steps, then four more, bit for bit eight."""
    args = [*QUICK, "--model", tiny_model, "--perturbation", "pgd", "--save_every", "4", "--eval_every", "4"]
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    check(run_train([*args, "--max_steps", "8", "--output_dir", whole]))
    check(run_train([*args, "--max_steps", "4", "--schedule_steps", "8", "--output_dir", grown]))
    done = check(run_train([*args, "--max_steps", "8", "--output_dir", grown, "--resume", "auto"]))
    assert "warning: --max_steps was 4 and is 8 now" in done.stderr
    assert "schedule ended" not in done.stderr
    assert torch.equal(last_prompt(grown), last_prompt(whole))
    assert torch.equal(adapter(grown), adapter(whole))
    settings = json.loads((grown / "result.json").read_text())["settings"]
    assert (settings["max_steps"], settings["schedule_steps"], settings["perturbation"]) == (8, None, "pgd")


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_older_checkpoint_is_gone_on_from(run_train, tiny_model, tmp_path):
    """It is left at step 6, between the older checkpoint and the newest of the run before: auto takes its own."""
    args = [*QUICK, "--model", tiny_model, "--save_every", "4", "--keep_checkpoints", "9", "--output_dir"]
    long = ["--schedule_steps", "20", "--max_steps"]
    branch, plain = tmp_path / "branch", tmp_path / "plain"
    check(run_train([*args, branch, "--max_steps", "8"]))
    four = branch / "checkpoints" / "step-000004"
    done = check(run_train([*args, branch, *long, "6", "--resume", four]))
    assert f"going on from {four}: set aside adapter.left, result.json.left, step-000008.left" in done.stdout
    assert [json.loads((branch / f"result.json{left}").read_text())["steps"] for left in (".left", "")] == [8, 6]
    done = check(run_train([*args, branch, *long, "10", "--resume", "auto"]))
    assert "resumed behind step 6" in done.stdout
    check(run_train([*args, plain, *long, "10", "--resume", four]))
    newest = "checkpoints/step-000010/state.safetensors"
    assert torch.equal(load_file(branch / newest)["prompt"], load_file(plain / newest)["prompt"])
    lines = map(json.loads, (branch / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 11))


@pytest.mark.parametrize("resume", [pytest.param([], marks=pytest.mark.slow), ["--resume", "auto"]])
def test_the_folder_of_a_run_that_failed_before_it_saved_is_used_again(run_train, tiny_model, tmp_path, resume):
    """Its steps are gone from the log and from TensorBoard; the run that follows is as in a folder of its own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = [*QUICK, "--model", tiny_model, "--max_steps", "2", "--sigma", "0.2"]
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    failed = run_train([*args[:-4], "--max_steps", "6", "--sigma", "1e42", "--output_dir", out])
    assert failed.returncode == 2
    assert (out / "config.json").exists()
    assert not list(out.glob("checkpoints/*"))
    check(run_train([*args, "--output_dir", out, *resume]))
    check(run_train([*args, "--output_dir", fresh]))
    assert torch.equal(last_prompt(out), last_prompt(fresh))
    assert json.loads((out / "config.json").read_text())["run"]["sigma"] == 0.2
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]


def test_carried_deltas_resume_bit_for_bit(run_train, tiny_model, tmp_path):
    """free, K = 3, saved behind steps 1 to 5: wherever a run goes on, it ends in the same prompt."""
    args = [*QUICK, "--model", tiny_model, "--perturbation", "free", "--ascent_steps", "3", "--max_steps", "6",
            "--save_every", "1", "--keep_checkpoints", "9", "--epsilon", "0.5"]  # fmt: skip
    whole = tmp_path / "whole"
    check(run_train([*args, "--output_dir", whole]))
    held = {
        step: (whole / "checkpoints" / f"step-{step:06}" / "carried-00000.safetensors").is_file()
        for step in range(1, 7)
    }
    assert held == {1: True, 2: True, 3: False, 4: True, 5: True, 6: False}
    for step in (2, 4):
        again = tmp_path / f"again-{step}"
        check(run_train([*args, "--output_dir", again, "--resume", whole / "checkpoints" / f"step-{step:06}"]))
        assert torch.equal(last_prompt(again), last_prompt(whole)), step


@pytest.mark.slow
def test_carried_deltas_of_two_ranks_resume_on_two_and_on_one(run_train, tiny_model, tmp_path):
    """Each rank's part is a file; bit for bit on as many ranks, to rounding on another number."""
    args = [*QUICK, "--model", tiny_model, "--perturbation", "free", "--ascent_steps", "3", "--max_steps", "3",
            "--save_every", "1", "--keep_checkpoints", "9", "--epsilon", "0.5"]  # fmt: skip
    whole = tmp_path / "whole"
    check(run_train([*args, "--output_dir", whole], nproc=2))
    second = whole / "checkpoints" / "step-000002"
    parts = [load_file(second / f"carried-{rank:05}.safetensors") for rank in range(2)]
    assert sorted(torch.cat([part["places"] for part in parts]).tolist()) == [0, 1, 2, 3]
    assert all(part["deltas"].abs().sum() > 0 for part in parts)
    for ranks in (2, 1):
        again = tmp_path / f"again-{ranks}"
        check(run_train([*args, "--output_dir", again, "--resume", second], nproc=ranks))
        if ranks == 2:
            assert torch.equal(last_prompt(again), last_prompt(whole))
        else:
            torch.testing.assert_close(last_prompt(again), last_prompt(whole), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_sigterm_saves_and_stops_and_resumes(run_train, tiny_model, tmp_path):
    args = [*QUICK, "--model", tiny_model, "--perturbation", "none", "--max_steps", "400", "--save_every", "0",
            "--eval_every", "0", "--lr_schedule", "constant"]  # fmt: skip
    out = tmp_path / "run"
    process = start([*args, "--output_dir", out], tmp_path)
    wait_for(out / "log.jsonl", process)
    while (out / "log.jsonl").read_text().count("\n") < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output[1][-2000:]
    assert "--resume auto" in output[0]
    saved = sorted((out / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    assert not list((out / "checkpoints").glob(".*"))
    step = int(saved[0].name.removeprefix("step-"))
    assert 3 <= step < 400


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_on_all_ranks_and_leaves_none(tiny_model, tmp_path):
    """The owner's command on this machine, two ranks, no ssh; DeepSpeed's own runner would leave the ranks behind."""
    out = tmp_path / "run"
    script = [str(ROOT / "scripts" / "train.py"), "--ds_config", str(ROOT / "ds_configs" / "zero3.json")]
    args = [*QUICK, "--model", tiny_model, "--perturbation", "none", "--max_steps", "2000", "--save_every", "0",
            "--eval_every", "0", "--output_dir", out]  # fmt: skip
    launcher = [sys.executable, "-m", "ptp_ds.launch", "--hostfile", str(ROOT / "hostfiles" / "local"), *script]
    process = subprocess.Popen(
        [*launcher, *map(str, args)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=child_environment(),
    )  # fmt: skip
    wait_for(out / "log.jsonl", process)
    while (out / "log.jsonl").read_text().count("\n") < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "stopped by signal 15" in output[0], output[1][-2000:]
    assert len(list((out / "checkpoints").glob("step-*"))) == 1
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False).stdout
    assert left == ""


@pytest.mark.slow
def test_non_finite_loss_names_the_step_and_saves_nothing_broken(run_train, tiny_model, tmp_path):
    out = tmp_path / "run"
    args = [*QUICK, "--model", tiny_model, "--perturbation", "gaussian", "--max_steps", "6", "--save_every", "2"]
    done = run_train([*args, "--sigma", "1e42", "--output_dir", out, "--log_every", "4"])
    assert done.returncode == 2
    assert "not finite at step 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.glob("checkpoints/step-*"))
    assert not (out / "result.json").exists()
    assert not (out / "adapter").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21.2 asks for it
def test_adapter_round_trip_through_evaluate_and_peft(run_train, tiny_model, tmp_path):
    """Invariant 6's second half: evaluate.py and peft give the scores that training's evaluation reported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptp_ds.tasks import load_task
    from ptp_ds.tasks.data import load_split, tokenise

    out, scores_file = tmp_path / "run", tmp_path / "scores.json"
    check(run_train([*QUICK, "--model", tiny_model, "--max_steps", "3", "--output_dir", out, "--lr", "0.3"]))
    given = ["--adapter", out / "adapter", "--model", tiny_model, "--json", scores_file, "--eval_tokens", "600"]
    check(run_script("evaluate.py", given))
    report, result = json.loads(scores_file.read_text()), json.loads((out / "result.json").read_text())
    assert report["metrics"] == result["metrics"]
    assert report["cross_entropy"] == result["eval_cross_entropy"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out / "adapter").eval()
    task, tokenizer = load_task("COPA"), AutoTokenizer.from_pretrained(tiny_model)
    examples = tokenise(task, load_split(task, "val", None, None), tokenizer, 400).examples
    for example, ours in zip(examples[:6], report["scores"], strict=False):
        for answer, score in zip(example.candidate_ids, ours, strict=True):
            ids = torch.tensor([[*example.context_ids, *answer]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            first = log_probs.shape[0] - len(answer) - 1
            theirs = sum(float(log_probs[first + place, token]) for place, token in enumerate(answer))
            assert abs(theirs - score) < 1e-5 * max(1.0, abs(score))


def test_adapter_starts_another_run(run_train, tiny_model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    args = [*QUICK, "--model", tiny_model, "--perturbation", "none", "--max_steps", "1"]
    check(run_train([*args, "--output_dir", first]))
    extra = ["--prompt_init", "adapter", "--init_adapter", first / "adapter", "--lr", "1e-12"]
    check(run_train([*args, "--output_dir", second, *extra]))
    torch.testing.assert_close(last_prompt(second), adapter(first), atol=1e-6, rtol=1e-6)


def test_bf16_backbone_keeps_an_fp32_master(run_train, tiny_model, tmp_path):
    args = [*QUICK, "--model", tiny_model, "--perturbation", "gaussian",
            "--max_steps", "3", "--save_every", "2", "--lr", "1e-4", "--keep_checkpoints", "3"]  # fmt: skip
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        check(run_train([*args, "--precision", precision, "--output_dir", out]))
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        losses[precision] = next(line["loss"] for line in lines if line["kind"] == "train")
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    prompt = last_prompt(tmp_path / "bf16")
    assert not torch.equal(prompt, prompt.bfloat16().float())
    again = tmp_path / "again"
    saved = tmp_path / "bf16" / "checkpoints" / "step-000002"
    check(run_train([*args, "--precision", "bf16", "--output_dir", again, "--resume", saved]))
    assert torch.equal(last_prompt(again), prompt)


def test_an_output_folder_that_cannot_be_made(run_train, tiny_model):
    done = run_train([*QUICK, "--model", tiny_model, "--output_dir", "/proc/none/run"])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(
        "error: Can't write to /proc/none/run: No such file or directory; nothing had been saved yet: "
    )
    assert "Traceback" not in done.stderr
