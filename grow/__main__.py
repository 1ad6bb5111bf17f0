"""What `grow` and `python -m grow` run."""

import atexit
import os
import sys

from grow.cli.main import main
from grow.errors import LEFT


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    code = 0

    def end_at_once() -> None:
        """After preemption all is on the disk: to take an interpreter with a model apart would take another second."""
        if code == LEFT:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # Before all others, so that it comes after them: a tracker may have its last lines to send.
    atexit.register(end_at_once)
    code = main()
    sys.exit(code)


if __name__ == "__main__":
    run()
