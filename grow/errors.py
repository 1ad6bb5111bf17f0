"""The errors that end a command: `grow` prints one line and exits with the exit code."""

import difflib
from collections.abc import Iterable

LEFT = 75
"""The exit code of Preempted, sysexits.h's "try again"."""


class UserError(Exception):
    """Reports a mistake in what was asked for, exit code 2. The message is one line: it names the thing and says what
    to do."""


class Fault(Exception):
    """Reports a failure that is not the user's mistake, exit code 1. The message is one line, too."""


class Preempted(Exception):
    """Reports that the system preempted a run, which wrote a checkpoint, exit code 75: run the same command again."""


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """Returns one line about an unknown name: it suggests the nearest known one, or lists all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"{name} is not a {what}" + (f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}")


def one_line(error: Exception | str) -> str:
    """Returns the message with unprintable characters escaped, such as line ends and terminal codes in file names."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(error))


def innermost(error: BaseException) -> str:
    """Returns the first cause of an error, in one line."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return " ".join(str(error).split())[:300] or type(error).__name__
