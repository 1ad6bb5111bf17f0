"""What ends a command: `grow` prints one line and leaves with the exit code."""

import difflib
from collections.abc import Iterable

LEFT = 75
"""The exit code of Preempted, sysexits.h's "try again"."""


class UserError(Exception):
    """A mistake in what was asked for, exit code 2. The message is one line: it names the thing and says what to do."""


class Fault(Exception):
    """Something broke that nobody asked for, exit code 1. One line too."""


class Preempted(Exception):
    """The system asked a run to go, and it left with a checkpoint, exit code 75: run the same command again."""


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """One line about a name that does not exist: the nearest that does, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"{name} is not a {what}" + (f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}")


def one_line(error: Exception) -> str:
    """The message; what it names may hold anything in its name, line ends and commands to a terminal included."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(error))


def innermost(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return " ".join(str(error).split())[:300] or type(error).__name__
