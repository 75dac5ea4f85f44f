"""How commands end: a user's error is a sentence and exit code 2, any other a traceback and exit code 1."""

import subprocess
import sys
from importlib import import_module

import pytest

from ptp_ds.commands.exits import run_command
from ptp_ds.errors import UserError
from ptp_ds.studies.pictures import save
from tests.support.processes import child_environment


def refuse():
    raise UserError("--lr is -1; expected more.")


def test_a_users_error_is_one_sentence(capsys):
    assert run_command(refuse) == 2
    assert capsys.readouterr().err == "error: --lr is -1; expected more.\n"


@pytest.mark.parametrize("error", [ValueError("of torch's"), TypeError("of ours"), RuntimeError("of CUDA's")])
def test_other_errors_are_not_called_the_users(error, capsys):
    def fail():
        raise error

    with pytest.raises(type(error)):
        run_command(fail)
    assert capsys.readouterr().err == ""


def test_a_fault_of_the_program_shows_its_traceback_and_exits_with_1():
    code = "import sys\nfrom ptp_ds.commands.exits import run_command\nsys.exit(run_command(lambda: int('x')))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: invalid literal for int() with base 10: 'x'\n")
    assert "error:" not in done.stderr


@pytest.mark.parametrize(("place", "said"), [("file", " is a file"), ("file/below", ": {file} is a file")])
@pytest.mark.parametrize(
    ("command", "flag"),
    [("landscape", "--output_dir"), ("robustness", "--output_dir"), ("evaluate", "--lm_eval_tasks")],
)
def test_a_folder_that_can_not_be_is_refused_before_anything_is_opened(command, flag, place, said, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    given = str(tmp_path / place)
    adapter = "--adapter" if command == "evaluate" else "--adapters"
    argv = [adapter, str(tmp_path / "nothing"), flag, given]
    assert import_module(f"ptp_ds.commands.{command}").main(argv) == 2
    assert capfd.readouterr().err == f"error: {flag} {given}{said.format(file=tmp_path / 'file')}; give a folder.\n"


def test_a_picture_that_can_not_be_written_is_one_sentence(tmp_path):
    from matplotlib.figure import Figure

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"below/a\.png can't be written \(Not a directory\); make room there"):
        save(Figure(), tmp_path / "file" / "below" / "a.png")
    save(Figure(), tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").stat().st_size > 0
