"""How long a run takes to leave when it is asked to (SIGTERM), beside `cp` and `sync` of its checkpoint's bytes.

    python -m tests.benchmarks.leaving FOLDER [--method g_freeze] [--repeat 3]

On the real 270M in one process. Prints a table; tests nothing. FOLDER is that of tests/benchmarks/training.py.
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import fire

from tests.benchmarks.training import ours_recipe, prepare
from tests.helpers.tiny import ROOT

STEPS = 5
"""It is asked when so many are done: at the start of one, which it has to finish."""
COPIES = 5


def leave(recipe: Path, out: Path) -> tuple[float, float, int, list[float]]:
    """Seconds from signal to exit, seconds a step, the checkpoint's bytes, seconds of each `cp` and `sync` of it."""
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grow", "train", str(recipe)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    steps = []
    for line in process.stdout:
        if found := re.search(r"([\d.]+) s/step", line):
            steps.append(float(found[1]))
        if len(steps) == STEPS:
            break
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    if process.wait() != 75:
        raise SystemExit(f"exit {process.returncode}")
    left = time.monotonic() - asked
    (checkpoint,) = out.glob("checkpoint-*")
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return left, statistics.median(steps), size, sorted(copy(checkpoint, out / "copy") for _ in range(COPIES))


def copy(checkpoint: Path, to: Path) -> float:
    """Seconds of `cp` and `sync`, from memory into a folder that is not there yet."""
    shutil.rmtree(to, ignore_errors=True)
    os.sync()
    begun = time.monotonic()
    subprocess.run(["cp", "-r", checkpoint, to], check=True)
    os.sync()
    return time.monotonic() - begun


def bench(folder: str, method: str = "g_freeze", repeat: int = 3) -> None:
    """Prints the table."""
    work = Path(folder).resolve()
    work.mkdir(parents=True, exist_ok=True)
    recipe = ours_recipe(method, prepare(work, "270M"), work, work / "leaving", stage=1, steps=1000)
    print("| signal to exit | one step | checkpoint | cp + sync, min / median / max | (exit − step) ÷ median |")
    print("|---|---|---|---|---|")
    for _ in range(repeat):
        left, step, size, copies = leave(recipe, work / "leaving")
        spread = " / ".join(f"{seconds:.2f}" for seconds in (copies[0], statistics.median(copies), copies[-1]))
        ratio = (left - step) / statistics.median(copies)
        print(f"| {left:.2f} s | {step:.2f} s | {size / 1e6:.0f} MB | {spread} s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    fire.Fire(bench)
