"""The next step made ready during this one: the very run that makes each step when it comes to it, resumed or not."""

import json
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import ptp_ds
from ptp_ds.config.run_config import RunConfig
from ptp_ds.training.drawn import Ahead
from ptp_ds.training.engine import Engine
from ptp_ds.training.trainer import Trainer
from tests.training.test_checkpoint import names_in

pytestmark = pytest.mark.usefixtures("no_launcher")

QUICK = {"task": "COPA", "prompt_length": 4, "batch_size": 4, "eval_tokens": 600, "lr": 0.1, "verbose": False}


def test_a_step_is_made_once_whenever_it_is_asked_for():
    made = []
    ahead = Ahead(lambda step: made.append(step) or f"step {step}")
    assert ahead.take(0) == "step 0"
    ahead.prepare(1)
    assert made == [0, 1]
    assert ahead.take(1) == "step 1"
    assert ahead.take(1) == "step 1"
    ahead.prepare(5)
    assert ahead.take(2) == "step 2", "another step than the one foreseen"
    assert made == [0, 1, 1, 5, 2]


@pytest.fixture
def order(monkeypatch):
    """What happens in a run that looks ahead as on a GPU, in order: rows made by step, backwards, updates."""
    events: list[object] = []

    def observed(owner, name, what):
        own = getattr(owner, name)

        def call(self, *args, **kwargs):
            events.append(args[0] if what == "row" else what)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    observed(Trainer, "drawn", "row")
    observed(Engine, "backward_sum", "backward")
    observed(Engine, "step", "update")
    return events


def look_ahead(monkeypatch):
    """On a CPU, too."""
    may = cached_property(lambda self: True)
    may.__set_name__(Trainer, "may_look_ahead")
    monkeypatch.setattr(Trainer, "may_look_ahead", may)


def last_state(folder):
    return load_file(folder / "checkpoints" / names_in(folder / "checkpoints")[-1] / "state.safetensors")


@pytest.mark.parametrize(
    "perturbation", ["pgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("free", "mask+gaussian"))]
)
def test_bit_for_bit_the_same_run(tiny_model, tmp_path, monkeypatch, order, perturbation):
    """mask draws its words at random; free keeps a batch for two steps and carries deltas, through a resume, too."""
    flags = {**QUICK, "model": tiny_model, "perturbation": perturbation, "log_every": 1, "save_every": 1}
    ptp_ds.train(**flags, max_steps=4, output_dir=tmp_path / "plain")
    assert order == [event for step in range(4) for event in (step, "backward", "update")]
    order.clear()
    look_ahead(monkeypatch)
    ptp_ds.train(**flags, max_steps=4, output_dir=tmp_path / "ahead")
    assert order == [0, *[event for step in (1, 2, 3) for event in ("backward", step, "update")], "backward", "update"]

    def stop(line):
        if line["kind"] == "train" and line["step"] == 2:
            raise ptp_ds.StopRun

    ptp_ds.train(**flags, max_steps=4, output_dir=tmp_path / "resumed", callbacks=[stop])
    assert names_in(tmp_path / "resumed" / "checkpoints")[-1] == "step-000002"
    ptp_ds.train(**flags, max_steps=4, output_dir=tmp_path / "resumed", resume="auto")
    states = [last_state(tmp_path / name) for name in ("plain", "ahead", "resumed")]
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    losses = [
        [line["loss"] for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
         if line["kind"] == "train"]
        for name in ("plain", "ahead")
    ]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("perturbation", ["free", pytest.param("mask+gaussian", marks=pytest.mark.slow)])
def test_a_population_bit_for_bit(tiny_model, tmp_path, monkeypatch, order, perturbation):
    """All members' rows are made before the update, member by member, and joined."""
    flags = {**QUICK, "model": tiny_model, "perturbation": perturbation, "seeds": "0-1", "max_steps": 3}
    ptp_ds.train(**flags, output_dir=tmp_path / "plain")
    assert order == [event for step in range(3) for event in (step, step, "backward", "update")]
    order.clear()
    look_ahead(monkeypatch)
    ptp_ds.train(**flags, output_dir=tmp_path / "ahead")
    assert order == [0, 0, "backward", 1, 1, "update", "backward", 2, 2, "update", "backward", "update"]
    members = names_in(tmp_path / "plain" / "members")
    assert len(members) == 2
    for member in members:
        plain, ahead = (last_state(tmp_path / name / "members" / member) for name in ("plain", "ahead"))
        assert all(torch.equal(ahead[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("perturbation", "device", "may"),
    [("none", "cuda", True), ("pgd", "cuda", True), ("mask", "cuda", True), ("mask+gaussian", "cuda", True),
     ("a2t", "cuda", False), ("a2t+gaussian", "cuda", False), ("own", "cuda", False), ("pgd", "cpu", False)],
)  # fmt: skip
def test_only_what_depends_on_the_steps_number_alone_is_made_before(perturbation, device, may, tmp_path):
    """An attack needs the prompt of its step, a user's function may hold a state; on a CPU nothing runs meanwhile."""
    if perturbation == "own":
        (tmp_path / "own.py").write_text(
            "from ptp_ds.perturb import Perturbation, Twin\n"
            "def twins(examples, settings, noise):\n"
            "    return [Twin(example.context_ids, example.movable) for example in examples]\n"
            "PERTURBATION = Perturbation(twins=twins, sizes=())\n"
        )
        perturbation = str(tmp_path / "own.py")
    trainer = SimpleNamespace(
        run=RunConfig(perturbation=perturbation), ranks=SimpleNamespace(device=torch.device(device))
    )
    assert Trainer.may_look_ahead.func(trainer) is may
