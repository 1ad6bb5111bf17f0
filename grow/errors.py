"""What is the user's to mend: `python -m grow` prints its one line and leaves with exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked for. The message is one line: it names the thing and says what to do."""


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """One line about a name that does not exist: the nearest that does, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"{name} is not a {what}" + (f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}")


def one_line(error: Exception) -> str:
    """The message; what it names may hold anything in its name, line ends and commands to a terminal included."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(error))
