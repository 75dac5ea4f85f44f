"""What a user did wrong, apart from what is wrong with the program."""


class UserError(ValueError):
    """A sentence for the user: what is wrong, what was expected, what to do. Commands print it and exit with code 2.

    Any other error, a ValueError too, is a fault of ours or of a library: commands show its traceback and exit with 1.
    """
