"""What a user did wrong, apart from what is wrong with the program."""


class UserError(ValueError):
    """A sentence for the user: what is wrong, what was expected, what to do. Commands print it and exit with code 2.

    Any other error, a ValueError too, is a fault of ours or of a library: commands show its traceback and exit with 1.
    """


class UnwritableError(OSError, UserError):
    """A file that couldn't be written, in one sentence; an OSError of the cause's errno, too, which a run's guard of
    its output (ptp_ds.ranks.faults) catches like any other of its disk.
    """
