"""Thousands of damaged files at every loader: each loads to something valid or is refused in one sentence that names
it, at once, without taking memory, running code or opening another file."""

import csv
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from ptp_ds.adapters.origin import adapter_model, adapter_split, trained_max_length
from ptp_ds.adapters.read import adapter_kind, read_adapter, read_card, read_head
from ptp_ds.adapters.task import adapter_plan, adapter_task
from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.overall import group_results, read_result, table_of, table_text
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import sha256_of
from ptp_ds.models.heads import HeadPlan
from ptp_ds.models.identity import difference, model_identity
from ptp_ds.models.source import load_config
from ptp_ds.tasks import NoLabelError, load_task
from ptp_ds.tasks.data import load_rows, load_split, tokenise
from ptp_ds.tasks.predictions import prediction_lines
from ptp_ds.training.carried import part_name
from ptp_ds.training.checkpoint import (
    Checkpoint,
    OtherFormatError,
    find_checkpoint,
    load_checkpoint,
    require_same_run,
    save_checkpoint,
)
from ptp_ds.training.evaluate import Evaluation
from ptp_ds.training.monitor import _open_log
from ptp_ds.training.progress import progress_from
from tests.support.mutations import damage
from tests.support.paths import ROOT

SECONDS = 5  # for one file
FILES = 250  # for each loader
HEAD = {"score.weight": (2, 32)}
ROWS: dict[str, list[dict]] = {
    "CB": [{"premise": "It rains, he said.", "hypothesis": "it rains", "label": "neutral", "idx": 0}] * 3,
    "AX-g": [{"premise": "She left.", "hypothesis": "she left", "label": "entailment", "idx": 0}] * 2,
    "MultiRC": [{"idx": 0, "passage": {"text": "A day. A night.", "questions": [
        {"idx": 0, "question": "What?", "answers": [{"idx": 0, "text": "A day.", "label": 1}]}]}}],
    "ReCoRD": [{"idx": 0, "passage": {"text": "Ann met Bo.\n@highlight\nBo left.", "entities": [
        {"start": 0, "end": 2}, {"start": 8, "end": 9}]},
        "qas": [{"idx": 0, "query": "Then @placeholder left.", "answers": [{"start": 8, "end": 9, "text": "Bo"}]}]}],
    "WSC": [{"idx": 0, "label": True, "text": "Ann thanked Mary because she had helped.", "target": {
        "span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 4}}],
}  # fmt: skip
TEMPLATE = {
    "name": "CB", "text": "{premise|strip_stop}\nQ: {hypothesis}\nA:", "truncate": "premise", "label": "label",
    "verbalizers": {"entailment": " yes", "contradiction": " no", "neutral": " maybe"}, "attack": ["premise"],
    "fixed": ["hypothesis"], "metrics": ["accuracy"],
}  # fmt: skip
IDENTITY = {"task": {"name": "CB", "text": "{premise}"}, "seed": 3}
RESULT = {"task": "CB", "model": "m", "perturbation": "pgd", "prompt": "soft", "eval_split": "val", "seed": 0,
          "metrics": {"accuracy": 0.5, "macro_f1": 0.25}}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A loader. write(folder) makes its files; load(folder) reads them, and checks what it read.

    named: whether a refusal names the file; settings are flags as well, a wrong one is named by its flag.
    """

    write: Callable[[Path], None]
    load: Callable[[Path], Any]
    named: bool = True


class TooLongError(BaseException):
    """A loader took longer than SECONDS."""


def _text(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def targets(tiny_model, tokenizer) -> dict[str, Target]:
    """Every loader, by name."""
    config = load_config(tiny_model)
    identity = model_identity(tiny_model, config)

    def adapter(folder: Path) -> None:
        settings = {"settings": {"max_length": 100}}
        card = {"task": load_task("CB").spec(), "head": {"kind": "causal"}, "result": RESULT | settings,
                "model": {"name": "owner/model", **identity}, "data": {"data_dir": None, "dataset": None}}  # fmt: skip
        write_adapter(folder / "adapter", torch.randn(4, 32), "model", config, card)

    def read_any_adapter(folder: Path) -> None:
        given = folder / "adapter"
        task = adapter_task(str(given), None)
        plan, _ = adapter_plan(str(given), config, task)
        prompt = read_adapter(given, 32, 4, "soft")  # as --prompt_init adapter does
        alone = read_adapter(given)
        assert adapter_kind(given) == "soft"
        assert isinstance(difference(read_card(given).get("model") or {}, identity), str)
        assert isinstance(adapter_model(given, None), str)
        assert isinstance(adapter_split(given, task), str)
        assert (trained_max_length(given) or 1) > 0
        assert plan.kind in ("causal", "masked", "classes", "seq2seq")
        assert prompt.shape == (4, 32)
        assert prompt.dtype == torch.float32
        assert torch.isfinite(prompt).all()
        assert torch.equal(alone, prompt)
        assert read_head(given, {}) == {}

    def classifier(folder: Path) -> None:
        head = {name: torch.randn(shape) for name, shape in HEAD.items()}
        plan = HeadPlan("classes", False, 2)
        write_adapter(folder / "adapter", torch.randn(4, 64), "m", config, {"head": {}}, "deep", plan, head)

    def read_classifier(folder: Path) -> None:
        assert read_adapter(folder / "adapter", 64, kind="deep").shape[1] == 64
        assert read_head(folder / "adapter", HEAD)["score.weight"].isfinite().all()
        assert isinstance(read_card(folder / "adapter"), dict)

    def checkpoint(folder: Path) -> None:
        tensors = {name: torch.rand(4, 8) for name in ("prompt", "exp_avg", "exp_avg_sq", "best_prompt")}
        tensors |= {"adam_step": torch.tensor([3.0]), "carried_delta": torch.randn(9, 8), "loss_scaler": torch.ones(4)}
        scores = Evaluation({"accuracy": 0.5}, 0.5, 0.7, 0.4, 6).as_dict()
        best = {"step": 2, "evaluation": scores, "highest": 0.5}
        parts = [([2, 0], torch.randn(5, 8)), ([1], torch.randn(4, 8))]
        save_checkpoint(folder, Checkpoint(5, tensors, best, IDENTITY), 1, parts)

    def read_checkpoint(folder: Path) -> None:
        named = find_checkpoint(str(folder / "step-000005"))
        meta, state = named / "state.json", named / "state.safetensors"
        parts = [named / part_name(rank) for rank in range(2)]
        if all(file.is_file() and file.stat().st_size < 1 << 30 for file in (meta, state, *parts)):
            resign(meta, state, parts)
        found = load_checkpoint(named)
        require_same_run(found, IDENTITY, named)
        progress = progress_from(found)
        assert progress.step >= 0
        if found.carried:
            assert progress.carried is not None
            progress.carried.whole = None
            assert progress.carried.of([3, 4, 2], [1, 2], torch.device("cpu")).isfinite().all()
        assert progress.best is None or progress.best.within_an_error_of(progress.highest) in (True, False)
        assert progress.best is None or math.isfinite(progress.highest)
        prompt = found.tensors["prompt"]
        assert prompt.ndim == 2
        assert found.tensors["exp_avg_sq"].shape == prompt.shape
        assert all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in found.tensors.values())

    def read_deepspeed(folder: Path) -> None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        file = str(folder / "ds.json")
        resolved = resolve_ds_config(read_ds_config(file), RunConfig(ds_config=file), set(), 2, 32)
        assert resolved.stage in (2, 3)
        assert DeepSpeedZeroConfig(**resolved.config["zero_optimization"]).stage == resolved.stage
        assert "auto" not in resolved.config.values()
        assert resolved.dtype in (torch.float32, torch.bfloat16)

    def read_rows(name: str) -> Callable[[Path], None]:
        def load(folder: Path) -> None:
            task = load_task(str(folder / "task.json") if (folder / "task.json").exists() else name)
            for split in (load_split(task, "val", str(folder / "data"), None),
                          load_rows(str(folder / "data" / name / "val.jsonl"))):  # fmt: skip
                for labelled in (True, False):
                    tokenised = tokenise(task, split, tokenizer, 100, labelled)
                    assert all(len(example.context_ids) < 100 for example in tokenised.examples)
                lines = prediction_lines(task, split, [0] * len(tokenised.examples))
                assert len(lines) >= len(split.rows)
                json.dumps(lines).encode()

        return load

    def task(folder: Path) -> None:
        _text(folder / "task.json", TEMPLATE)
        _lines(folder / "data" / "CB" / "val.jsonl", ROWS["CB"])

    def read_results(folder: Path) -> None:
        found = group_results([read_result(str(folder / "a")), read_result(str(folder / "b"))])
        for table in [table_of(*parts) for parts in found]:
            assert "\n" in table_text(table)

    def results(folder: Path) -> None:
        for seed, name in enumerate("ab"):
            _text(folder / name / "result.json", {**RESULT, "seed": seed})

    def read_settings(folder: Path) -> None:
        run, _ = parse_run(["--config", str(folder / "run.json")])
        assert run.step_length >= 0
        assert isinstance(run.lr, float | int)

    def table(folder: Path) -> None:
        file, (row, *_) = folder / "data" / "CB" / "val.csv", ROWS["CB"]
        file.parent.mkdir(parents=True)
        with open(file, "w", encoding="utf-8", newline="") as opened:
            csv.writer(opened, quoting=csv.QUOTE_ALL).writerows([row, *[row.values()] * 3])

    def read_table(folder: Path) -> None:
        split = load_split(load_task("CB"), "val", str(folder / "data"), None)
        assert load_rows(str(folder / "data" / "CB" / "val.csv")) == split
        assert tokenise(load_task("CB"), split, tokenizer, 100).examples

    settings = {"lr": 0.1, "max_steps": 5, "task": "CB", "perturbation": "pgd", "mask_token": None, "epsilon": 0.1}

    def read_log(folder: Path) -> None:
        if (folder / "log.jsonl").is_dir():
            return  # refused where the run's folder is made
        with _open_log(folder / "log.jsonl", 3):
            pass
        kept = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        assert all(json.loads(line)["step"] <= 3 for line in kept)

    def of_rows(name: str) -> Target:
        return Target(lambda folder: _lines(folder / "data" / name / "val.jsonl", ROWS[name]), read_rows(name))

    steps = [{"step": number, "loss": 0.5} for number in range(6)]
    packaged = [json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))]
    return {
        "adapter": Target(adapter, read_any_adapter), "classifier": Target(classifier, read_classifier),
        "checkpoint": Target(checkpoint, read_checkpoint), "template": Target(task, read_rows("CB")),
        "deepspeed": Target(lambda folder: _text(folder / "ds.json", packaged[len(str(folder)) % 3]), read_deepspeed),
        "results": Target(results, read_results),
        "settings": Target(lambda folder: _text(folder / "run.json", settings), read_settings, named=False),
        "table": Target(table, read_table),
        "log": Target(lambda folder: _lines(folder / "log.jsonl", steps), read_log),
        **{name: of_rows(name) for name in ROWS},
    }  # fmt: skip


def resign(meta: Path, state: Path, parts: list[Path]) -> None:
    """The sha256 of a damaged state in its state.json, as someone who means harm would write it."""
    try:
        known = json.loads(meta.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(known, dict) and isinstance(known.get("sha256"), str):
        carried = {"carried": [sha256_of(part) for part in parts]} if "carried" in known else {}
        meta.write_text(json.dumps({**known, "sha256": sha256_of(state), **carried}))


_RUNS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
         "ctypes.dlopen", "shutil.rmtree")  # fmt: skip


class Watch:
    """An audit hook, on while a loader runs: which other files it opens, and whether it runs anything."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in _RUNS:
            self.seen.append(event)
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith((self.folder, str(ROOT), *map(os.path.realpath, sys.path))):
                self.seen.append(f"open {path}")


@pytest.fixture(scope="module")
def watch() -> Watch:
    """The one watch of this process: audit hooks can't be removed."""
    return Watch()


@contextmanager
def limited(watch: Watch, folder: Path) -> Iterator[None]:
    """At most SECONDS, under watch."""

    def stop(number: int, frame: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watch.folder = str(folder)
    try:
        yield
    finally:
        watch.folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "README.md")


def fault_of(target: Target, folder: Path, watch: Watch) -> tuple[str, str]:
    """('', outcome) where all is well: loaded, or refused; else what is wrong, and the message."""
    watch.seen.clear()
    try:
        with limited(watch, folder):
            target.load(folder)
        outcome, message = "loaded", ""
    except ValueError as error:
        outcome, message = "refused", str(error)
        if type(error) not in (UserError, NoLabelError, OtherFormatError):
            return f"{type(error).__name__} is not the project's", message
        if target.named and str(folder) not in message:
            return "the message doesn't name the file", message
        if not message.isprintable() or len(message) > 600 + len(str(folder)) or not message.endswith("."):
            return "the message is no sentence on one line", message
    except (Exception, TooLongError) as error:
        return f"{type(error).__name__}: {error}", ""
    return (f"ran or opened {watch.seen}" if watch.seen else ""), outcome


def sweep(target: Target, name: str, count: int, root: Path, watch: Watch) -> Counter:
    """`count` damaged copies of the target's files, each loaded; AssertionError lists the faults with their seeds."""
    target.write(root / "whole")
    found, faults = Counter[str](), []
    for seed in range(count):
        draw, folder = random.Random(f"{name} {seed}"), root / f"case{seed}"
        shutil.copytree(root / "whole", folder)
        file = draw.choice(files_of(folder))
        how = damage(file, draw)
        fault, outcome = fault_of(target, folder, watch)
        if fault:
            faults.append(f"{name} {seed}: {how} of {file.name}: {fault} | {outcome[:700]}")
        found[outcome] += 1
        shutil.rmtree(folder)
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])
    return found


NAMES = ("adapter", "classifier", "checkpoint", "template", "deepspeed", "results", "settings", "log", "table", *ROWS)


def check(name: str, count: int, targets: dict[str, Target], root: Path, watch: Watch) -> None:
    """A sweep with its bounds: files that are whole load, some damaged ones do, many are refused, memory stays flat."""
    targets[name].write(root / "sound")
    targets[name].load(root / "sound")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = sweep(targets[name], name, count, root, watch)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 256, f"{grown} MiB more"
    assert found["loaded"] + found["refused"] == count
    assert found["loaded"] >= count // 50
    assert name == "log" or found["refused"] >= count // 5, found


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_load_or_are_refused(name, targets, tmp_path, watch):
    check(name, FILES, targets, tmp_path, watch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files(name, targets, tmp_path, watch):
    check(name, 4000, targets, tmp_path, watch)


def test_at_least_two_thousand_files():
    assert FILES * len(NAMES) >= 2000


def test_the_checkpoint_knows_an_evaluation_s_fields():
    from ptp_ds.training import checkpoint

    assert {"metrics", *checkpoint._NUMBERS} == {field.name for field in fields(Evaluation)}
