"""A Python program trains again and again in one process: each run is what a process of its own would give."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.processes import worker_environment
from tests.support.runs import adapter, check, last_prompt

FRESH = {"variables": [], "group": False, "linear": False}
SETTINGS = {"task": "COPA", "prompt_length": 5, "batch_size": 4, "eval_tokens": 600, "max_steps": 2, "lr": 0.1}


def other_model(tiny_model: Path, folder: Path) -> Path:
    """The tiny model's folder with other weights in one layer more."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_model)
    config.num_hidden_layers = 3
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_each_run_in_one_process_is_a_fresh_ones(run_train, tiny_model, tmp_path):
    """Both ZeRO stages, two models, threads, and a run that failed in between: bit for bit, and nothing is left."""
    models = {"one": tiny_model, "other": other_model(tiny_model, tmp_path / "other_model")}
    plan = [("one", 3, False), ("other", 2, True), ("broken", 3, False), ("one", 3, True)]
    runs = []
    for number, (model, stage, thread) in enumerate(plan):
        fields = {**SETTINGS, "model": str(models.get(model, tiny_model)), "ds_config": f"ds_configs/zero{stage}.json"}
        fields |= {"perturbation": "gaussian", "sigma": 1e42} if model == "broken" else {"perturbation": "pgd"}
        runs.append({**fields, "output_dir": str(tmp_path / f"{number}"), "thread": thread})
    worker = ROOT / "tests" / "support" / "runs_worker.py"
    done = check(subprocess.run([sys.executable, str(worker), json.dumps(runs)], env=worker_environment(), cwd=tmp_path,
                                capture_output=True, text=True, timeout=170, check=False))  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"found"')]
    assert [line["left"] for line in told] == [FRESH] * len(plan)
    for (model, _, _), line in zip(plan, told, strict=True):
        if model == "broken":
            assert "not finite at step 1" in line["found"][0]
        else:
            assert line["found"] == [0], done.stderr[-2000:]
    fresh = {}
    for number, (model, stage, _) in enumerate(plan):
        if model == "broken":
            continue
        if (model, stage) not in fresh:
            fresh[model, stage] = tmp_path / f"{model}-{stage}"
            kept = {name: value for name, value in runs[number].items() if name != "thread"}
            flags = {**kept, "output_dir": fresh[model, stage]}
            check(run_train([word for name, value in flags.items() for word in (f"--{name}", value)]))
        assert torch.equal(last_prompt(tmp_path / f"{number}"), last_prompt(fresh[model, stage])), (model, stage)
        assert torch.equal(adapter(tmp_path / f"{number}"), adapter(fresh[model, stage]))
    assert not torch.equal(last_prompt(fresh["one", 3]), last_prompt(fresh["other", 2]))
