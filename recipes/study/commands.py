"""Commands of `grow`, run by a study."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def arguments(values: dict[str, Any]) -> list[str]:
    """Returns values as arguments of a command, a list with commas, and so {a: 1, b: 2} as a=1,b=2."""
    return [f"--{name}={_text(value)}" for name, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key}={one}" for key, one in value.items()]
    return ",".join(value) if isinstance(value, list) else str(value)


def grow(*words: str | Path) -> None:
    """Runs a command of `grow`, whose output goes to stderr. An exit code other than 0 ends the study. A signal is
    passed on; whatever the command makes of that, the study ends with 75."""
    # -P keeps the working folder out of sys.path, so that the same `grow` is imported as here.
    command = [sys.executable, "-P", "-m", "grow", *map(os.path.expandvars, map(str, words))]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    asked = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr) as process:

        def leave(which: int, _: Any) -> None:
            asked.append(which)
            process.send_signal(which)

        before = {which: signal.signal(which, leave) for which in (signal.SIGTERM, signal.SIGUSR1)}
        code = process.wait()
    for which, handler in before.items():
        signal.signal(which, handler)
    if code or asked:
        raise SystemExit(75 if asked else code)
