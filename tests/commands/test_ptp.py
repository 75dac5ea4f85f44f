"""The ptp command: its help without torch, its commands, and names in the place of packaged files."""

import os
import subprocess
import sys

import pytest

from ptp_ds import __version__
from ptp_ds.commands.ptp import COMMANDS, main, run
from ptp_ds.config.ds_config import read_ds_config
from ptp_ds.config.parsers import PARSERS
from ptp_ds.files import shipped, shipped_names
from tests.support.paths import ROOT
from tests.support.processes import worker_environment
from tests.support.zygote import run_script

HEAVY = ("torch", "transformers", "deepspeed", "numpy", "datasets")


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=worker_environment(), capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    out = in_fresh_python(
        f"import sys\nfrom ptp_ds.commands.ptp import main\ncode = main([{name!r}, '--help'])\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], code)"
    )
    assert "HEAVY [] 0" in out
    assert f"usage: ptp {name}" in out
    assert COMMANDS[name].split(":")[0][:30] in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--taks", "x"], "Unknown argument '--taks' (did you mean '--task'?). See --help."),
        (["train", "--lr", "much"], "Argument --lr: invalid float value: 'much'. See --help."),
        (["evaluate", "--adapter", "x", "--splt=val"],
         "Unknown argument '--splt=val' (did you mean '--split'?). See --help."),
        (["study", "x.yaml", "--output_dir", "x", "--seed"], "Unknown argument '--seed'. See --help."),
    ],
)  # fmt: skip
def test_a_wrong_flag_imports_nothing_heavy(argv, said):
    out = in_fresh_python(
        f"import sys\nfrom ptp_ds.commands.ptp import main\nsys.stderr = sys.stdout\ncode = main({argv!r})\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], code)"
    )
    assert out == f"error: {said}\nHEAVY [] 2\n"


@pytest.mark.parametrize("variable", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_launchers_ranks_are_left_to_the_command(monkeypatch, capsys, variable):
    """Which lets rank 0 alone speak."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("ptp_ds.commands.train.main", lambda argv, description: 7)
    monkeypatch.setattr("ptp_ds.ranks.distributed.exit_process", lambda code: None)
    assert run("train", ["--taks", "x"]) == 2
    assert "Unknown argument" in capsys.readouterr().err
    monkeypatch.setenv(variable, "1")
    assert run("train", ["--taks", "x"]) == 7
    assert capsys.readouterr().err == ""


def test_importing_the_package_brings_no_torch_and_its_names_come_when_asked():
    out = in_fresh_python(
        f"import sys, ptp_ds\nprint([m for m in {HEAVY!r} if m in sys.modules], sorted(ptp_ds.__all__))\n"
        "print(ptp_ds.RunConfig().task, 'torch' in sys.modules)\n"
        "print(ptp_ds.load_task('CB').name)\n"
        "try:\n    ptp_ds.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    lines = out.splitlines()
    assert lines[0].startswith("[] ['Predictor', 'Result', 'RunConfig'")
    assert lines[1:] == ["Reviews False", "CB", "module 'ptp_ds' has no attribute 'nothing'"]


def test_trains_help_is_in_groups(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n{group}:\n") for group in ("model", "data", "prompt", "perturbation", "output")]
    assert places == sorted(places)
    assert out.index("\nperturbation:\n") < out.index("--sigma X") < out.index("\nobjective:\n")


def test_every_command_has_a_parser_a_script_and_a_place_in_the_overview(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert set(COMMANDS) == set(PARSERS)
    for name, summary in COMMANDS.items():
        assert f"  {name:12}{summary}" in out
        assert shipped("scripts", f"{name}.py") == ROOT / "scripts" / f"{name}.py"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ptp_ds {__version__}\n"


def test_an_unknown_command_is_one_sentence(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: Unknown command 'trian' (did you mean 'train'?): give one of ")
    assert main(["launch"]) == 2
    assert main(["launch", "--help"]) == 0
    assert "usage: ptp launch" in capsys.readouterr().out


def test_a_user_error_is_one_sentence_and_code_2(capsys):
    assert run("overall", ["nowhere"]) == 2
    assert capsys.readouterr().err == (
        "error: nowhere holds no result.json; give the folders of runs that have ended.\n"
    )


def test_scripts_are_the_same_commands(tmp_path):
    done = run_script("train.py", ["--task", "CB", "--dump_config", tmp_path / "run.yaml"])
    assert done.returncode == 0, done.stderr
    assert "\ntask: CB\n" in (tmp_path / "run.yaml").read_text()
    assert not list(tmp_path.glob("runs"))


def test_ds_configs_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "zero3.json" in shipped_names("ds_configs", ".json")
    for name in ("zero3", "zero3.json", "ds_configs/zero3.json", "ds_configs/zero3"):
        assert read_ds_config(name)["zero_optimization"]["stage"] == 3
    (tmp_path / "zero3").write_text('{"zero_optimization": {"stage": 2}}')
    assert read_ds_config("zero3")["zero_optimization"]["stage"] == 2  # a file that is there is what was meant
    with pytest.raises(ValueError, match=r"--ds_config zero9: No such file.*; give a file, or one of zero2, zero3,"):
        read_ds_config("zero9")
    assert shipped("ds_configs", "../setup.py") is None


def test_launch_starts_the_commands_script_behind_the_launchers_flags(monkeypatch, capsys):
    seen: list[list[str]] = []
    monkeypatch.setattr("ptp_ds.launch.launcher.main", lambda argv: seen.append(argv) or 7)
    assert main(["launch", "--hostfile", "local", "--max_restarts", "1", "train", "--task", "study"]) == 7
    assert main(["launch", "-H", "node8", "study", "x.yaml"]) == 7
    scripts = ROOT / "scripts"
    assert seen == [
        ["--hostfile", "local", "--max_restarts", "1", str(scripts / "train.py"), "--task", "study"],
        ["-H", "node8", str(scripts / "study.py"), "x.yaml"],
    ]


def test_words_for_the_shell(tmp_path):
    """By argcomplete's own protocol, as bash calls it."""
    pytest.importorskip("argcomplete")
    line = "ptp train --divergence_g"
    env = {**worker_environment(), "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
           "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"), "_ARGCOMPLETE_IFS": "\n"}  # fmt: skip
    subprocess.run([sys.executable, "-m", "ptp_ds"], env=env, timeout=60, check=False)
    assert (tmp_path / "words").read_text().split() == ["--divergence_gradient"]
    assert "_ARGCOMPLETE" not in os.environ


def test_doctor_finds_packaged_hostfiles_by_name_as_launch_does(monkeypatch, tmp_path, capsys):
    """A file of that name here goes first."""
    from ptp_ds.commands import doctor

    seen = []
    monkeypatch.setattr(
        doctor, "examine", lambda args, hosts, shared: (seen.append((args.hostfile, hosts)), ({}, []))[1]
    )
    monkeypatch.setattr(doctor, "find_faults", lambda *rest: [])
    monkeypatch.setattr(doctor, "table", lambda *rest: "")
    monkeypatch.chdir(tmp_path)
    assert doctor.main(["--hostfile", "local", "--no_collectives"]) == 0
    (tmp_path / "local").write_text("other slots=1\n")
    assert doctor.main(["--hostfile", "local", "--no_collectives"]) == 0
    assert seen == [(str(ROOT / "hostfiles" / "local"), ["localhost"]), ("local", ["other"])]
    capsys.readouterr()
    assert doctor.main(["--hostfile", "lokal"]) == 2
    assert (
        "--hostfile lokal: there is no such file; give a path, or a packaged one: local, node8."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--help", "--perturbation", "nothere.py"], "--perturbation nothere.py: No such file or directory"),
        (["--help", "--perturbation"], "expected one argument"),
        (["--dump_config"], "expected one argument"),
        (["--dump_config", "--config", "x.yaml"], "expected one argument"),
    ],
)
def test_what_can_not_be_parsed_is_one_sentence(argv, said, capfd, monkeypatch):
    """Before a command takes over, too."""
    monkeypatch.setattr("ptp_ds.ranks.distributed.exit_process", lambda code: None)
    assert main(["train", *argv]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said.lower() in line.lower()
