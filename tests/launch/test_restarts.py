"""--max_restarts: which ends are repeated, with which command line, on which hosts."""

import json

import pytest
from deepspeed.launcher.runner import parse_args

from ptp_ds.config.parsers import PARSERS
from ptp_ds.launch.restarts import (
    _HANDS_OVER,
    asked_slots,
    check_script,
    checkpoints_left,
    dealt_ranks,
    flags_for,
    newest_checkpoint,
    settings_of_runs,
    should_restart,
    slots_left,
    start_of,
    with_resume,
)
from ptp_ds.ranks.faults import LOST_RANK, STALLED, explain_code, shell_code
from ptp_ds.training.checkpoint import set_aside
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("code", "repeated"),
    [(0, False), (2, False), (130, False), (143, False), (138, False), (1, True), (137, True), (STALLED, True),
     (LOST_RANK, True), (134, True), (139, True)],
)  # fmt: skip
def test_which_ends_are_repeated(code, repeated):
    assert should_restart(code) == repeated


@pytest.mark.parametrize(
    ("returncode", "code", "words"),
    [(-9, 137, "SIGKILL"), (-15, 143, "SIGTERM"), (1, 1, "exit code 1"), (75, 75, "--stall_timeout"),
     (76, 76, "lost the connection"), (-6, 134, "SIGABRT"), (200, 200, "exit code 200")],
)  # fmt: skip
def test_codes(returncode, code, words):
    assert shell_code(returncode) == code
    assert words in explain_code(code)


def test_an_output_folder_is_needed(tmp_path):
    check_script(["train.py", "--output_dir", "out"])
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"output_dir": "out"}))
    check_script(["train.py", "--config", str(config)])
    with pytest.raises(ValueError, match="--max_restarts goes on from the checkpoints in"):
        check_script(["train.py", "--task", "CB"])


def test_resumed_command_lines(tmp_path):
    plain = ["train.py", "--output_dir", str(tmp_path), "--seed", "1"]
    assert with_resume(plain) == [*plain, "--resume", "auto"]
    named = [*plain, "--resume", "elsewhere/step-000009"]
    assert newest_checkpoint(named) is None
    assert with_resume(named) == named
    (tmp_path / "checkpoints" / "step-000012").mkdir(parents=True)
    assert newest_checkpoint(named) == "step-000012"
    (tmp_path / "members" / "seed-0" / "checkpoints" / "step-000020").mkdir(parents=True)
    assert newest_checkpoint(named) == "step-000020", "a population's members save on their own"
    assert with_resume(named) == [*named, "--resume", "auto"]


@pytest.mark.parametrize(("named", "aside"), [("run/checkpoints/step-000060", ["step-000080"]),
                                              ("other/step-000009", ["step-000060", "step-000080"])])  # fmt: skip
def test_a_run_that_was_left_is_not_gone_on_from(tmp_path, named, aside):
    """Until the run that names a checkpoint has set aside what it leaves, --resume auto would take the newest of it."""
    root, given = tmp_path / "run/checkpoints", str(tmp_path / named)
    for folder in (root / "step-000060", root / "step-000080", tmp_path / "other/step-000009"):
        folder.mkdir(parents=True, exist_ok=True)
    script = ["train.py", "--output_dir", str(tmp_path / "run"), "--resume", given]
    before = checkpoints_left(script)
    assert with_resume(script, before) == script, "the ranks died before they had set anything aside"
    assert start_of(script, before) == given
    assert set_aside(root, tmp_path / named, damaged=False) == [f"{name}.left" for name in aside]
    gone_on = script if newest_checkpoint(script) is None else [*script, "--resume", "auto"]
    assert with_resume(script, before) == gone_on
    (root / "step-000080").mkdir()
    assert with_resume(script, before) == [*script, "--resume", "auto"], "this run's own, of the same name"
    assert start_of(script, before) == "step-000080"


@pytest.mark.parametrize("named", [["--resume", "auto"], [], ["--resume", "no such folder"]])
def test_nothing_is_left_where_no_checkpoint_is_named(tmp_path, named):
    (tmp_path / "checkpoints" / "step-000080").mkdir(parents=True)
    script = ["train.py", "--output_dir", str(tmp_path), *named]
    assert with_resume(script, checkpoints_left(script)) == [*script, "--resume", "auto"]


@pytest.mark.parametrize("name", ["predict", "study"])
def test_a_users_script_may_have_the_name_of_one_of_ours(tmp_path, name):
    """Ours, and a copy of it, hand themselves over by their name; a user's own has train's flags."""
    own, copy = tmp_path / f"{name}.py", tmp_path / "copy" / f"{name}.py"
    own.write_text("import ptp_ds\n")
    copy.parent.mkdir()
    copy.write_bytes((ROOT / "scripts" / f"{name}.py").read_bytes())
    script = [str(own), "--output_dir", str(tmp_path), "--batch_size", "6"]
    check_script(script)
    assert settings_of_runs(script)[0]["batch_size"] == 6
    assert with_resume(script) == [*script, "--resume", "auto"]
    for file in (ROOT / "scripts" / f"{name}.py", copy):
        with pytest.raises(ValueError, match="predict starts anew" if name == "predict" else "--batch_size"):
            check_script([str(file), *script[1:]])


def test_every_script_of_a_command_says_that_it_is_ours():
    for name in PARSERS:
        assert _HANDS_OVER in (ROOT / "scripts" / f"{name}.py").read_bytes(), name


@pytest.mark.parametrize(
    ("ranks", "settings", "dealt"),
    [(56, {"batch_size": 64}, 32), (8, {}, 8), (7, {}, 4), (7, {"batch_size": 7}, 7), (3, {"batch_size": 2}, 2),
     (4, {"gradient_accumulation_steps": 4}, 2), (7, {"tokens_per_step": 4096}, 7), (3, {"batch_size": 1}, 1)],
)  # fmt: skip
def test_ranks_that_the_batch_deals_out_to(ranks, settings, dealt):
    assert dealt_ranks(ranks, settings) == dealt


def test_a_batch_that_isnt_set_was_dealt_to_the_ranks_before():
    """64 rows on 64 ranks, of which 56 are left."""
    assert dealt_ranks(56, {}, before=64) == 32
    assert dealt_ranks(7, {"gradient_accumulation_steps": 2}, before=8) == 4
    assert dealt_ranks(7, {"batch_size": 14}, before=8) == 7


SLOTS = {"a": [0, 1], "b": [0, 1], "c": [1, 2]}


def test_hosts_that_are_left():
    assert slots_left(SLOTS, None, [{}], lambda host, port: True) == (SLOTS, [])
    left, told = slots_left(SLOTS, 22, [{}], lambda host, port: host != "a" and port == 22)
    assert left == {"b": [0, 1], "c": [1, 2]}
    assert told == ["a can't be reached by ssh and is left out"]
    left, told = slots_left(SLOTS, None, [{"batch_size": 9}], lambda host, port: host != "b")
    assert left == {"a": [0, 1], "c": [1]}
    assert told[1] == "the batch deals out in equal parts to 3 of the 4 ranks that are left"
    with pytest.raises(ValueError, match="None of the hosts a, b, c can be reached by ssh"):
        slots_left(SLOTS, None, [{}], lambda host, port: False)


def test_a_studys_cells_all_deal_out_to_the_ranks_that_are_left(tmp_path):
    """Batches of 12 and 8 on the four ranks that are left; of 9 and 6 on three; of 9 and 8 on one alone."""
    for common, of_task, ranks in ((12, 8, 4), (9, 6, 3), (9, 8, 1)):
        study = {"settings": {"batch_size": common}, "tasks": {"A": None, "B": {"batch_size": of_task}},
                 "methods": {"plain": {"perturbation": "none"}}}  # fmt: skip
        (tmp_path / "study.json").write_text(json.dumps(study))
        script = ["scripts/study.py", str(tmp_path / "study.json"), "--output_dir", "out"]
        found = settings_of_runs(script)
        assert [run["batch_size"] for run in found] == [common, of_task]
        left, _ = slots_left(SLOTS, None, found, lambda host, port: host != "b")
        assert sum(map(len, left.values())) == ranks


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"tasks": 3, "settings": [1]}', '{"tasks": {"A": 1}, "methods": {"m": 2}}']
)
def test_a_study_that_is_none_is_left_to_the_study_to_refuse(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    found = settings_of_runs(["study.py", str(tmp_path / "study.json"), "--output_dir", "out"])
    assert slots_left(SLOTS, None, found, lambda host, port: host != "a")[0] == {"b": [0, 1], "c": [1, 2]}


def test_a_study_is_started_again_as_it_was_and_other_commands_are_refused(tmp_path):
    study = ["study.py", "study.yaml", "--output_dir", str(tmp_path), "--tasks", "A"]
    check_script(study)
    assert with_resume(study) == study
    assert start_of(study) == "the cells that aren't finished"
    with pytest.raises(ValueError, match="--output_dir"):
        check_script(study[:2])
    with pytest.raises(ValueError, match=r"--max_restarts is for train and study, .*; evaluate starts anew"):
        check_script(["scripts/evaluate.py", "--adapter", "runs/cb"])
    check_script(["my_own.py", "--output_dir", "out"])


@pytest.mark.parametrize("given", [[], ["--include", "a@b:0"], ["--exclude", "c"], ["--num_nodes", "2"]])
def test_the_flags_choose_the_slots_by_deepspeeds_own_rules(tmp_path, given):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# mine\na slots=2\nb slots=2\nc slots=3\n")
    own = ["--hostfile", str(hostfile), *given, "--master_addr", "10.0.0.1"]
    assert set(asked_slots([*own, "train.py"])[0]) >= {"a", "b"}
    wanted = {"b": [1], "c": [0, 2]}
    flags = flags_for(own, wanted, tmp_path / "new", new_first=True)
    assert asked_slots([*flags, "train.py", "--seed", "1"])[0] == wanted
    args = parse_args([*flags, "train.py", "--seed", "1"])
    assert (args.master_addr, args.user_args) == ("", ["--seed", "1"])
    kept = [*flags_for(own, {"a": [0, 1], "b": [1]}, tmp_path / "new", new_first=False), "train.py"]
    assert asked_slots(kept)[0] == {"a": [0, 1], "b": [1]}
    assert parse_args(kept).master_addr == "10.0.0.1"


def test_a_run_on_this_machine_alone_asks_no_host(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    assert asked_slots(["--hostfile", str(hostfile), "train.py"])[0] == {}
    assert asked_slots(["--hostfile", str(tmp_path / "none"), "train.py"])[0] == {}
