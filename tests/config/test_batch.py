"""A batch size that nobody gave: the default in equal parts, on record as what it was, and kept by what goes on."""

import json
import re
import shlex
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import torch

from ptp_ds.commands.introduction import introduction
from ptp_ds.commands.members import prepare_population
from ptp_ds.commands.train import prepare
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.flags import parse_run
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.checkpoint import Checkpoint, save_checkpoint
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "hostfiles/README.md",
         ROOT / "scripts/slurm.sbatch"]  # fmt: skip
STARTS = ("deepspeed ", "ptp launch ", "sbatch ", "torchrun ")
RANKS_A_NODE = 8  # of scripts/slurm.sbatch
ZERO3 = {"zero_optimization": {"stage": 3}}


def documented() -> dict[str, tuple[int, list[str]]]:
    """Commands of the pages that train on several ranks: their ranks, and train's flags."""
    found = {}
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            for text in [line.strip("# "), *re.findall(r"`([^`]+)`", line)]:
                words = shlex.split(text, comments=True) if text.startswith(STARTS) else []
                script = next(
                    (word for word in words if word in ("train", "scripts/train.py", "scripts/slurm.sbatch")), ""
                )
                own = list(takewhile(lambda word, script=script: word != script, words))
                if script and (ranks := ranks_of(own)):
                    found[text] = ranks, [word for word in words[len(own) + 1 :] if word != "..."]
    return found


def ranks_of(own: list[str]) -> int:
    """Ranks that a launcher's flags start; 0 where they name a placeholder."""
    given = dict(pairwise(own))
    if (hosts := given.get("--hostfile")) is not None:
        file = ROOT / "hostfiles" / Path(hosts).name
        return sum(map(int, re.findall(r"slots=(\d+)", file.read_text()))) if file.is_file() else 0
    count = given.get("--nodes", given.get("--nproc_per_node", "0"))
    return int(count) * (RANKS_A_NODE if "--nodes" in given else 1) if count.isdecimal() else 0


COMMANDS = documented()


def test_the_headline_s_commands_are_among_those_that_are_tried():
    headline = "deepspeed --hostfile hostfiles/node8 scripts/train.py --ds_config ds_configs/zero3.json"
    assert COMMANDS[headline][0] == 64
    assert {2, 64} <= {ranks for ranks, _ in COMMANDS.values()}
    assert "#SBATCH --ntasks-per-node=8\n" in (ROOT / "scripts/slurm.sbatch").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_deal_their_batch_to_their_ranks(command):
    ranks, flags = COMMANDS[command]
    run, explicit = parse_run(flags)
    found = resolve_ds_config(read_ds_config(run.ds_config), run, explicit, ranks, 32, host_ranks=min(8, ranks)).config
    assert (
        found["train_micro_batch_size_per_gpu"] * ranks * run.gradient_accumulation_steps == found["train_batch_size"]
    )


@pytest.mark.parametrize(
    ("ranks", "parts", "batch"), [(64, 1, 64), (16, 1, 16), (3, 1, 9), (6, 2, 12), (4, 2, 8), (1, 1, 8)]
)
def test_the_default_is_rounded_up_and_the_start_says_so(ranks, parts, batch):
    result = resolve_ds_config(ZERO3, RunConfig(gradient_accumulation_steps=parts), set(), ranks, 32)
    assert result.config["train_batch_size"] == batch
    told = f"batch_size = {batch} (the default, 8, rounded up for {ranks} ranks x {parts} micro-batches)"
    assert (told in result.notes) == (batch != 8)


@pytest.mark.parametrize(
    ("raw", "given", "explicit"),
    [({}, {}, {"batch_size"}), ({}, {"batch_size": 20}, set()), ({"train_batch_size": 8}, {}, set()),
     ({"train_micro_batch_size_per_gpu": 8}, {}, set())],
)  # fmt: skip
def test_a_number_that_was_given_is_refused_as_it_is(raw, given, explicit):
    with pytest.raises(UserError, match=r"--batch_size (8|20) can't be dealt to 64 ranks x 1 micro-batches"):
        resolve_ds_config({**ZERO3, **raw}, RunConfig(**given), explicit, 64, 32)


@pytest.fixture
def on_ranks(tiny_model, tmp_path, monkeypatch):
    """on_ranks(number, *flags): the run that each of so many ranks prepares, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(ranks: int, *flags: str):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, str(ranks))
        base = ["--model", str(tiny_model), "--task", "CB", "--prompt_length", "4", "--max_steps", "2"]
        parsed = parse_run([*base, "--output_dir", "out", *flags])
        return prepare_population(*parsed) if "--seeds" in flags else prepare(*parsed)

    return run


def save(prepared, folder: str = "out") -> None:
    """A checkpoint of step 1, as the run writes it."""
    tensors = {name: torch.zeros(4, 32) for name in ("prompt", "exp_avg", "exp_avg_sq")}
    checkpoint = Checkpoint(1, {**tensors, "adam_step": torch.zeros(1)}, None, prepared.identity)
    save_checkpoint(Path(folder) / "checkpoints", checkpoint, keep=1)


def test_what_was_used_is_on_record_and_goes_on_with_other_ranks(on_ranks):
    """On 6 ranks 12 rows; 4 get 3 each, and 5 can't share them."""
    first = on_ranks(6)
    assert (first.run.batch_size, first.identity["batch_size"]) == (12, 12)
    lines = introduction(first, Ranks(0, 6, 0, torch.device("cpu")))
    assert any(line.startswith("  steps: 2 of 12 rows (2 a rank)") for line in lines)
    assert "auto: batch_size 12 (the default, 8, rounded up for 6 ranks x 1 micro-batches), " in lines[-1]
    save(first)
    again = on_ranks(4, "--resume", "auto")
    assert (again.run.batch_size, again.resolved.config["train_micro_batch_size_per_gpu"]) == (12, 3)
    with pytest.raises(UserError, match="--batch_size 12 can't be dealt to 5 ranks"):
        on_ranks(5, "--resume", "auto")
    with pytest.raises(UserError, match="another run: its batch_size is 12, this run's is 8"):
        on_ranks(4, "--resume", "auto", "--batch_size", "8")


def test_a_run_of_the_default_is_refused_where_its_8_rows_cant_be_dealt(on_ranks):
    save(on_ranks(2))
    with pytest.raises(UserError, match="--batch_size 8 can't be dealt to 3 ranks"):
        on_ranks(3, "--resume", "auto")


def test_members_of_a_population_go_on_with_one_batch_size(on_ranks):
    """Also one that has saved nothing yet."""
    members = on_ranks(6, "--seeds", "0-2")
    assert {one.run.batch_size for one in members.values()} == {12}
    for name in ("seed-1", "seed-2"):
        save(members[name], f"out/members/{name}")
    again = on_ranks(4, "--seeds", "0-2", "--resume", "auto")
    assert [one.run.batch_size for one in again.values()] == [12, 12, 12]


def test_result_json_says_what_was_used(run_train, tiny_model, tmp_path):
    """One rank, three micro-batches; then two, which 9 rows aren't dealt to."""
    args = ["--model", tiny_model, "--task", "COPA", "--prompt_length", "4", "--eval_tokens", "600", "--output_dir",
            tmp_path / "run", "--max_steps"]  # fmt: skip
    done = run_train([*args, "1", "--gradient_accumulation_steps", "3"])
    assert done.returncode == 0, done.stderr
    again = run_train([*args, "2", "--resume", "auto"])
    assert again.returncode == 0, again.stderr
    for file, key in (("result.json", "settings"), ("config.json", "run")):
        assert json.loads((tmp_path / "run" / file).read_text())[key]["batch_size"] == 9
    refused = run_train([*args, "3", "--resume", "auto", "--gradient_accumulation_steps", "2"])
    assert "--batch_size 9 can't be dealt to 1 ranks x 2 micro-batches in equal parts" in refused.stderr
