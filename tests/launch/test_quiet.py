"""DeepSpeed's launcher is quiet, but for what a user has not read yet."""

import logging

import pytest

from ptp_ds.launch.quiet import hush_echoes, quiet_flags


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["--hostfile", "h", "train.py", "-q"], ["--log_level=warning"]),
        (["--module", "ptp_ds.ranks.collectives"], ["--log_level=warning"]),
        (["--log_level", "info", "train.py"], []),
        (["--log_level=debug", "train.py"], []),
        (["-q", "train.py"], []),
        (["--quiet", "train.py"], []),
    ],
)
def test_quiet_unless_the_user_chose_a_level(argv, flags):
    assert quiet_flags(argv) == flags


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        ("['python', 'train.py'] exits with return code = 2", False),
        ("['python', 'train.py'] exits with return code = 143", False),
        ("['python', 'train.py'] exits with return code = -15", False),
        ("['python', 'train.py'] exits with return code = 1", True),
        ("['python', 'train.py'] exits with return code = -9", True),
        ("Bad hostfile text: ['host slot=2']", False),
        ("unable to create directory", True),
    ],
)
def test_what_was_said_before_is_left_out(message, heard):
    from deepspeed.utils import logger

    hush_echoes()
    hush_echoes()
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 1, message, (), None)
    assert bool(logger.filter(record)) is heard
