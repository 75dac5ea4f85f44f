"""What the package says: on rank 0 alone, without secrets, where a command or an importing program wants it."""

import logging
import subprocess
import sys

import pytest

from ptp_ds.ranks.log import ANY_RANK, get_logger, log_to_console
from tests.support.processes import child_environment

LOG = get_logger("ptp_ds.test_log")


@pytest.fixture(autouse=True)
def _console():
    log_to_console()


def test_lines_stay_as_they_are_and_warnings_go_to_standard_error(capsys):
    LOG.info("step %d", 3)
    LOG.warning("warning: odd")
    LOG.error("error: wrong")
    captured = capsys.readouterr()
    assert captured.out == "step 3\n"
    assert captured.err == "warning: odd\nerror: wrong\n"


def test_other_ranks_are_silent_but_for_what_any_rank_may_say(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    LOG.info("loss 0.5")
    LOG.warning("warning: odd")
    LOG.error("error on rank %d: lost", 3, extra=ANY_RANK)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error on rank 3: lost\n"


def test_secrets_are_replaced_whoever_listens(monkeypatch):
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    LOG.addHandler(listener)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    LOG.info("from https://user:%s@host", "hf_0123456789")
    LOG.removeHandler(listener)
    assert heard == ["from https://user:[secret]@host"]


def test_a_second_call_doubles_nothing(capsys):
    log_to_console()
    LOG.info("once")
    assert capsys.readouterr().out == "once\n"


def test_a_program_that_imports_the_package_decides_what_it_sees():
    """Nothing is printed by a program without handlers; its own handler sees records by level."""
    code = (
        "import logging\nfrom ptp_ds.ranks.log import get_logger\nlog = get_logger('ptp_ds.some.room')\n"
        "log.info('unheard')\nlogging.basicConfig(format='%(levelname)s %(name)s %(message)s', level='INFO')\n"
        "log.info('heard')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "INFO ptp_ds.some.room heard\n")


def test_a_reader_that_is_gone_ends_nothing():
    """Standard output's reader closes its pipe: what comes behind still runs."""
    code = (
        "import sys\nfrom ptp_ds.ranks.log import get_logger, log_to_console\nlog_to_console()\n"
        "log = get_logger('ptp_ds.x')\nsys.stdin.readline()\nlog.info('into the void')\nlog.info('again')\n"
        "log.warning('still here')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.stderr.read() == "still here\n"
        assert run.wait(60) == 0
