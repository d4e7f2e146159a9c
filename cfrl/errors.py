"""What a user is meant to read when something is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; the message is one line: which file, which row, what to do.

    The command line prints it and exits with status 2; a traceback appears only with ``--debug``.
    """


class NotFinite(UserError):
    """NaN or infinity where training or drawing cannot go on: a loss, a gradient, a weight, a probability."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing: the tail of an error message about an unknown name."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
