"""python -m grow"""

import atexit
import os
import sys

from grow.cli.main import main
from grow.errors import LEFT


def _gone() -> None:
    """Asked to leave, and all is on the disk: to take an interpreter with a model apart would take another second."""
    if code == LEFT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


code = 0
atexit.register(_gone)  # before all others, so that it comes after them: a tracker may have its last lines to send
code = main()
sys.exit(code)
