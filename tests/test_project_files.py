"""Files beside the package: what may stand at the top level, and whether what they say agrees with the code."""

import ast
import os
import re
import shlex
import stat
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch.distributed.run import get_args_parser

import ptp_ds
from ptp_ds.config.flags import build_parser, parse_run
from tests.support.paths import ROOT

# The first line is the owner's.
TOP_LEVEL = {
    "ptp_ds", "ds_configs", "hostfiles", "scripts", "tests", "setup.py",
    "README.md", "LICENSE", "pyproject.toml", ".ci", ".gitignore", "docs",
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Dockerfile",
}  # fmt: skip
# CFF 1.2.0: required keys of the file, of a reference, and the roles that one may play
CFF_KEYS, REFERENCE_KEYS = {"authors", "cff-version", "message", "title"}, {"authors", "title", "type"}


def documents(name: str) -> list:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


def setup_arguments() -> dict:
    """What setup.py hands to setup(), where it is a literal."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    found = {}
    for keyword in call.keywords:
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return found


SETUP = setup_arguments()


def test_nothing_else_stands_at_the_top_level():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: which files belong to the project can't be told")
    command = ["git", "-C", str(ROOT), "ls-files"]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {file.split("/")[0] for file in files}
    assert found <= TOP_LEVEL, f"add {sorted(found - TOP_LEVEL)} to a folder, or to TOP_LEVEL with a reason"


def test_the_changelog_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions[0] == ptp_ds.__version__
    sections = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_file_has_what_cff_asks_for():
    (cited,) = documents("CITATION.cff")
    assert cited.keys() >= CFF_KEYS
    assert (cited["cff-version"], cited["version"]) == ("1.2.0", ptp_ds.__version__)
    assert cited["license"] == SETUP["license"]
    paper = cited["preferred-citation"]
    assert paper.keys() >= REFERENCE_KEYS
    assert paper["type"] == "conference-paper"
    assert paper["conference"]["name"]
    for author in (*cited["authors"], *paper["authors"]):
        assert author.keys() in ({"name"}, {"family-names", "given-names"})
        assert all(isinstance(part, str) and part for part in author.values())
    assert paper["start"] < paper["end"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_copies_what_is_there_and_all_that_setup_needs():
    copied = [word for name, words in instructions() if name == "COPY" for word in words.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
    assert {"setup.py", "pyproject.toml", "ptp_ds/", "ds_configs/", "scripts/"} <= set(copied)


def test_the_dockerfiles_pins_lie_in_setups_ranges():
    extras = [one for extra in SETUP["extras_require"].values() for one in extra]
    ranges = {one.name: one.specifier for one in map(Requirement, [*SETUP["install_requires"], *extras])}
    text = " ".join(words for _, words in instructions())
    pins = dict(re.findall(r'"([\w.-]+)==([\w.]+)"', text))
    assert pins["torch"] in ranges["torch"]
    assert all(version in ranges[name] for name, version in pins.items() if name in ranges)
    set_up = (ROOT / "scripts" / "setup_env.sh").read_text()
    assert all(f'"{name}=={version}"' in set_up for name, version in pins.items())
    (wanted,) = re.findall(r"\.\[([\w,]+)\]", text)
    assert set(wanted.split(",")) <= SETUP["extras_require"].keys()
    pythons = set(re.findall(r"python(3\.\d+)", text))
    assert len(pythons) == 1
    assert f"{pythons.pop()}.0" in SpecifierSet(SETUP["python_requires"])


def test_the_image_doesnt_run_as_root():
    names = [name for name, _ in instructions()]
    user = next(words for name, words in instructions() if name == "USER")
    assert user not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT")


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """torchrun's own flags, and the script's; checks that the script is train.py."""
    own = list(takewhile(lambda word: not word.endswith(".py"), words))
    assert words[len(own)] == "scripts/train.py"
    return own, words[len(own) + 1 :]


def assert_trains(words: list[str]) -> None:
    """The words after scripts/train.py are its flags, hold together, and name files that are here."""
    build_parser("").parse_args(words)
    run, _ = parse_run(words)
    assert (ROOT / run.ds_config).is_file()
    assert run.resume == "auto"
    assert run.output_dir


def test_the_skypilot_example_starts_a_rank_a_gpu_on_every_machine(tmp_path):
    """Its `run` by bash as SkyPilot runs it, with a torchrun that says what it was given."""
    (task,) = documents("scripts/skypilot.yaml")
    tool = tmp_path / ".venv" / "bin" / "torchrun"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/bash\nprintf "%q " "$@" > words\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
             "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}  # fmt: skip
    subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env={**os.environ, **task["envs"], **given}, check=True)
    own, words = split_command(shlex.split((tmp_path / "words").read_text()))
    launch = get_args_parser().parse_args([*own, "train.py"])
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank) == ("2", "8", 1)
    assert launch.master_addr == "10.0.0.1"
    assert_trains(words)
    run, _ = parse_run(words)
    assert run.output_dir.startswith(next(iter(task["file_mounts"])))
    assert run.batch_size % (task["num_nodes"] * 8) == 0
    assert Path(ROOT / re.search(r"bash (scripts/\S+)", task["setup"])[1]).is_file()


def test_the_kubernetes_example_fits_torchrun_and_its_own_runtime(monkeypatch):
    runtime, job = documents("scripts/trainjob.yaml")
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    assert all(isinstance(word, str) for word in trainer["args"])  # Kubernetes takes text alone
    own, words = split_command(trainer["args"])
    gpus = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert gpus == trainer["numProcPerNode"]
    # what the torch policy of Kubeflow Trainer sets
    for name, value in (("NNODES", trainer["numNodes"]), ("NPROC_PER_NODE", gpus), ("NODE_RANK", 1),
                        ("MASTER_ADDR", "ptp-ds-reviews-node-0-0.ptp-ds-reviews"), ("MASTER_PORT", 29400)):  # fmt: skip
        monkeypatch.setenv(f"PET_{name}", str(value))
    launch = get_args_parser().parse_args([*own, "train.py"])
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank) == ("2", "8", 1)
    assert launch.master_addr == "ptp-ds-reviews-node-0-0.ptp-ds-reviews"
    (pods,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = pods["template"]["spec"]["template"]["spec"]
    assert launch.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert_trains(words)
    run, _ = parse_run(words)
    workdir = next(words for name, words in instructions() if name == "WORKDIR")
    assert str(Path(workdir) / run.output_dir).startswith(mounted["runs"])
    assert run.batch_size % (trainer["numNodes"] * gpus) == 0


def set_up(folder: Path, cuda: bool, gpu: bool) -> list[str]:
    """What scripts/setup_env.sh hands to a stand-in for .venv/bin/python in `folder`. gpu: nvidia-smi is there."""
    (folder / "scripts").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "scripts/setup_env.sh"):
        (folder / name).write_text((ROOT / name).read_text())
    stand_in = f'#!/bin/sh\ncase "$*" in *is_available*) exit {int(not cuda)} ;; esac\necho "$*" >> {folder}/said\n'
    (folder / "tools").mkdir(exist_ok=True)
    (folder / ".venv" / "bin" / "python").write_text(stand_in)
    (folder / "tools" / "nvidia-smi").unlink(missing_ok=True)
    if gpu:
        (folder / "tools" / "nvidia-smi").write_text("#!/bin/sh\n")
        (folder / "tools" / "nvidia-smi").chmod(0o755)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    (folder / "said").write_text("")
    path = f"{folder / 'tools'}:/usr/bin:/bin"
    subprocess.run(["bash", str(folder / "scripts/setup_env.sh")], env={"PATH": path}, check=True, capture_output=True)
    return (folder / "said").read_text().splitlines()


@pytest.mark.skipif(Path("/usr/bin/nvidia-smi").exists(), reason="a GPU is here, whatever the stand-ins say")
def test_set_up_installs_ligers_kernels_where_torch_sees_cuda(tmp_path):
    plain = set_up(tmp_path, cuda=False, gpu=False)
    assert any(line.endswith("-e .[complete,demo,plot,test]") for line in plain)
    assert set_up(tmp_path, cuda=False, gpu=False) == [], "once"
    completed = set_up(tmp_path, cuda=True, gpu=True)
    assert any(line.endswith("-e .[complete,demo,plot,test,kernels]") for line in completed)
    assert set_up(tmp_path, cuda=True, gpu=True) == []
    assert set_up(tmp_path, cuda=True, gpu=False) == [], "a host without a GPU keeps what one with a GPU has set up"
    other = tmp_path / "cpu_torch"
    assert any(line.endswith("-e .[complete,demo,plot,test]") for line in set_up(other, cuda=False, gpu=True))
    assert set_up(other, cuda=False, gpu=True) == []
