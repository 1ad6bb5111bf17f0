"""The one exception that is the user's to mend: `python -m grow` prints its line and leaves with exit code 2."""


class UserError(Exception):
    """A mistake in what was asked for. The message is one line: it names the thing and says what to do."""
