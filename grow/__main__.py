"""The entry point of `grow` and `python -m grow`."""

import atexit
import os
import sys

from grow.cli.main import main
from grow.errors import LEFT


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    code = 0

    def end_at_once() -> None:
        """Ends a preempted process without taking down the interpreter, which takes a second: all is on the disk."""
        if code == LEFT:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # Registered before all others, so that it runs after them: a tracker may have its last lines to send.
    atexit.register(end_at_once)
    code = main()
    sys.exit(code)


if __name__ == "__main__":
    run()
