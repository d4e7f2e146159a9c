"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend; the message is one line: which file, which row, what to do.

    The command line prints it and exits with status 2; a traceback appears only with ``--debug``.
    """


class NotFinite(UserError):
    """NaN or infinity where training or drawing cannot go on: a loss, a gradient, a weight, a probability."""
