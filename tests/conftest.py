"""Fixtures: a tiny random Llama and its tokenizer, the real SuperGLUE files, scripts/train.py as a process, the hub."""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may reach the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"ptp_ds_triton_{os.getuid()}"))
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # so that --precision auto is fp32, in processes of tests, too
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels then run on the CPU

from ptp_ds.ranks.distributed import Ranks, prepare_environment, start_processes, stop_processes
from ptp_ds.ranks.log import log_to_console
from tests.support.hub import TOKEN, Hub
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.tiny import write_tiny_model
from tests.support.two_hosts import TwoHosts, why_not
from tests.support.zygote import run_script

prepare_environment()
log_to_console()  # as a command does
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it: random Llama (width 32, 2 layers, 512 positions) and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def lively_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large that a divergence is no rounding, and its text depends on the prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, folder = AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path_factory.mktemp("lively") / "model"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tiny model's tokenizer, loaded as a run loads it."""
    from ptp_ds.models.source import load_tokenizer

    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def superglue() -> Path:
    """The folder with the real SuperGLUE files; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data" / "superglue"
    if not folder.is_dir():
        pytest.skip("SuperGLUE data is not here: no ../shared/data/superglue beside the repository")
    return folder


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """write_rows(file, rows) writes a jsonl file and its folders; a row may be a raw line. Returns the file."""

    def write(file: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    return write


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group that another test left in the environment is not this program's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch's operators on two threads, whatever this process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """The process group of this process alone, for a module; gone behind it."""
    yield start_processes()
    stop_processes()


@pytest.fixture
def run_train(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """run_train(args, env=None, nproc=1): scripts/train.py in tmp_path, on nproc ranks.

    By a fork; with an environment of its own by plain python, or torchrun where nproc > 1.
    """

    def run(args: Sequence[str], env: Mapping[str, str] | None = None, nproc: int = 1) -> subprocess.CompletedProcess:
        if env is None:
            return run_script("train.py", args, tmp_path, nproc)
        launcher = [sys.executable]
        if nproc > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        return subprocess.run(
            [*launcher, str(ROOT / "scripts" / "train.py"), *map(str, args)],
            env=child_environment(env),
            cwd=tmp_path, capture_output=True, text=True, timeout=170, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def no_environment_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No .deepspeed_env of the user's: a home and a working folder without one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts on this machine (tests/support/two_hosts.py), for all tests of a module."""
    if reason := why_not():
        pytest.skip(reason)
    with TwoHosts(tmp_path_factory.mktemp("hosts") / "two") as started:
        yield started


@pytest.fixture
def drill_row(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, str], None]:
    """drill_row(fault, how it was made, what the user sees, what was lost) adds a row to the fault drill's table."""
    return lambda *cells: record_property("drill", cells)


def pytest_collection_finish() -> None:
    """What imports and collection left is not searched for garbage again, of which every run of DeepSpeed asks."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: with a file a worker, nobody waits for them at the end."""
    longest = ("tests/commands/test_drill.py", "tests/training/test_engine.py")
    items.sort(key=lambda item: not item.nodeid.startswith(longest))


_PATH = re.compile(r"\S*/pytest-of-\S*?/(?=(run|disk)/?)")  # a test's own folder, in what a user sees


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the fault drill's table, where it was run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [cells for report in reports for name, cells in report.user_properties if name == "drill"]
    if rows:
        terminalreporter.write_sep("=", "faults")
        terminalreporter.write_line("| fault | how it was made | what the user sees | what was lost |")
        terminalreporter.write_line("|---|---|---|---|")
        for cells in rows:
            terminalreporter.write_line(
                "| " + " | ".join(_PATH.sub("", cell).replace("|", "/") for cell in cells) + " |"
            )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The hub, for huggingface_hub in this process, with a token that may write; its cache is empty."""
    from huggingface_hub import close_session, constants, hf_api

    home = tmp_path_factory.mktemp("hub")
    with Hub() as started:
        values = {
            "ENDPOINT": started.endpoint,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(home / "token"),
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{started.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", started.endpoint)  # of the module's own functions
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield started
    close_session()
