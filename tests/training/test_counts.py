"""What a train step's passes ask of a device: nothing that the host waits for, no more operators a layer than today.

The device is tests/support/chip.py's, in a worker process: real numbers, and everything asked of it counted. A GPU's
kernels (Triton's, Liger's, fused attention) aren't there; torch's own operators stand in for them.
"""

import json
import subprocess
import sys
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import ptp_ds
from ptp_ds.training.trainer import Trainer
from tests.support.chip import WAITS
from tests.support.paths import SUPPORT
from tests.support.processes import worker_environment

LLAMA = {"family": "llama", "shape": "multi"}
SILENT = {
    "none": {**LLAMA, "perturbation": "none"},
    "single tokens": {**LLAMA, "perturbation": "gaussian", "shape": "single", "narrows": True},
    "pgd": {**LLAMA, "perturbation": "pgd"},
    "recompute": {**LLAMA, "perturbation": "pgd", "mode": "recompute", "max_rows": 2},
    "free": {**LLAMA, "perturbation": "free", "divergence": "js", "shape": "ragged"},
    "twins": {**LLAMA, "perturbation": "mask+gaussian", "divergence": "kl", "min_confidence": 0.4, "shape": "ragged"},
    "deep": {**LLAMA, "perturbation": "pgd", "prompt": "deep"},
    "population": {**LLAMA, "perturbation": "pgd", "population": True},
    # of ragged rows: single ones have so small a divergence at pgd's start that bf16's rounding turns its ascents
    "bf16": {**LLAMA, "shape": "ragged", "perturbation": "pgd", "dtype": "bfloat16"},
    "windows": {"family": "mistral", "perturbation": "gaussian", "shape": "multi"},
    "soft caps": {"family": "gemma2", "perturbation": "gaussian", "shape": "multi"},
    "gpt2": {"family": "gpt2", "perturbation": "uniform", "shape": "multi"},
    **{family: {"family": family, "perturbation": "gaussian", "shape": "multi"}
       for family in ("qwen3", "gpt_neox", "opt", "phi")},
    **{family: {"family": family, "head": "masked", "perturbation": "gaussian", "shape": "multi"}
       for family in ("roberta", "albert", "modernbert")},
    "masked": {"family": "bert", "head": "masked", "perturbation": "pgd", "shape": "multi"},
    "deep encoder": {"family": "bert", "head": "masked", "prompt": "deep", "perturbation": "pgd", "shape": "multi"},
    "classes": {"family": "bert", "head": "classes", "perturbation": "mask", "shape": "single"},
}  # fmt: skip
QUICK = ("single tokens", "pgd", "twins", "deep", "population", "windows", "masked")
SENT = {"windows": 5, "soft caps": 5}  # else row and plan; here masks of layers that the plan can't tell beforehand
# Of a family's own forward, which padded passes leave as it is: (waits, copies).
PADDED = {"falcon": (0, 4), "bart": (3, 0), "bloom": (0, 0)}
LAYERS = {  # operators a layer: of the forward, ascents and all, and of the backward
    "none": (83, 126), "gaussian": (126, 187), "pgd": (336, 187),
}  # fmt: skip
DEEPER = {name: [{**LLAMA, "perturbation": name, "shape": "single", "narrows": True, "layers": n} for n in (2, 4)]
          for name in LAYERS}  # fmt: skip


def some(names):
    """Names of cases, of which the quick suite takes those in QUICK."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@cache
def counts_of(quick):
    """(the instrument's tries, counts by name of the cases that are quick or not, and of a population's "update")."""
    padded = {family: {"family": family, "perturbation": "gaussian", "shape": "multi"} for family in PADDED}
    deeper = {(name, n): case for name, pair in DEEPER.items() for n, case in enumerate(pair)}
    cases = {**SILENT, **padded, **deeper}
    cases = {name: case for name, case in cases.items() if (name in deeper or name in QUICK) is quick}
    command = [sys.executable, str(SUPPORT / "counts_worker.py"), json.dumps(list(cases.values()))]
    done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    instrument, update, *found = map(json.loads, done.stdout.splitlines())
    return instrument, {"update": update, **dict(zip(cases, found, strict=True))}


def counted(name):
    """A case's counts."""
    return counts_of(name in QUICK or isinstance(name, tuple))[1][name]


def test_the_instrument():
    """(waits, blocking copies, copies that nothing waits for) of one thing each."""
    kinds = {
        (1, 0, 0): {"item", "bool", "nonzero", "boolean index", "masked_select", "unique", "equal",
                    "repeat_interleave", "where", "tolist"},
        (0, 1, 0): {"cpu", "tensor", "to", "not pinned", "copy_", "an index of the host's", "pinned and waited for"},
        (0, 0, 1): {"pinned"},
        (0, 0, 0): {"arithmetic", "a number for where"},
    }  # fmt: skip
    assert {name: tuple(found) for name, found in counts_of(True)[0].items()} == {
        name: kind for kind, names in kinds.items() for name in names
    }


@pytest.mark.parametrize("name", some(SILENT))
def test_no_pass_waits(name):
    found = counted(name)
    assert (found["waits"], found["copies"]) == ({}, {})
    assert found["sent"] <= SENT.get(name, 2)


def test_a_populations_update_waits_for_nothing():
    """Members' rates are sent to the device; a lone prompt's AdamW is torch's."""
    assert counts_of(True)[1]["update"] == {"waits": {}, "copies": {}, "sent": 1}


@pytest.mark.slow
@pytest.mark.parametrize("family", PADDED)
def test_padded_passes_wait_for_the_familys_own_code_alone(family):
    found = counted(family)
    assert all("self.model" in what for what in (*found["waits"], *found["copies"]))
    for kind, most in zip(("waits", "copies"), PADDED[family], strict=True):
        assert sum(found[kind].values()) <= most


@pytest.mark.parametrize("name", some([*SILENT, *PADDED]))
def test_the_device_computes_what_the_host_does(name):
    """So the counts are those of a step that is right."""
    most = 0.05 if name == "bf16" else 1e-5
    assert counted(name)["loss_error"] < most
    assert counted(name)["error"] < most


@pytest.mark.parametrize("name", LAYERS)
def test_operators_a_layer(name):
    for part, most in zip(("forward", "backward"), LAYERS[name], strict=True):
        (less, more) = (counted((name, n))[part] for n in (0, 1))
        assert (more - less) / 2 <= most


class Reads(TorchDispatchMode):
    """Values that the host reads, by the file that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            asking = next(file for file in reversed(files) if file.name not in ("eval_frame.py", "_compile.py"))
            self.files["/".join(asking.parts[-3:])] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("stage", "theirs"),
    [("zero3", {"deepspeed/runtime/utils.py": 1}),
     ("zero2", {"deepspeed/runtime/utils.py": 2, "runtime/zero/stage_1_and_2.py": 1})],
)  # fmt: skip
def test_the_rest_of_a_step_waits_for_deepspeeds_own_checks_alone(stage, theirs, tiny_model, tmp_path, monkeypatch):
    """Whether the gradient is finite, once the step's work is launched. AdamW reads its step count, on the host."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    own, seen = Trainer._optimizer_step, []

    def observed(self, progress, meter):
        with Reads() as reads:
            own(self, progress, meter)
        seen.append(dict(reads.files))

    monkeypatch.setattr(Trainer, "_optimizer_step", observed)
    ptp_ds.train(
        task="COPA", model=tiny_model, perturbation="pgd", prompt_length=4, batch_size=4, max_steps=4, eval_tokens=600,
        log_every=100, precision="bf16", ds_config=f"ds_configs/{stage}.json", output_dir=tmp_path / "run",
        verbose=False,
    )  # fmt: skip
    host = {"torch/optim/optimizer.py": 1}
    assert seen[2:] == [{**theirs, **host}] * 2  # ZeRO-3 compares ranks' orders of modules in its first two
