"""Runs of the converter as processes of their own, to be stopped, killed and looked at from outside."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.tiny import ROOT, run

# Runs a command and kills it, by SIGKILL, when so many bytes are written; `stop` only stops it there.
DRIVER = """
import os, signal, sys
from pathlib import Path
from grow.checkpoint import consolidate, expand
command, source, out, size, place, how = sys.argv[1:]
written = 0
def progress(count, total):
    global written
    written += count
    if written >= float(place) * total:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
run = {"expand": expand.expand, "consolidate": consolidate.consolidate}[command]
run(source, out, max_shard_size=size, progress=progress)
"""

Shards = dict[str, tuple[int, int]]


def command(name: str, source: Path, out: Path, size: str) -> list[str]:
    return [sys.executable, "-m", "grow", name, str(source), str(out), "--max-shard-size", size]


def start(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)


def driven(*arguments: object) -> subprocess.Popen[str]:
    return start(sys.executable, "-c", DRIVER, *map(str, arguments))


def line_of(*words: str | Path, code: int = 2) -> str:
    done = run(*words, code=code)
    (line,) = done.stderr.splitlines()
    assert line.startswith("grow: ") and done.stdout == ""
    return line


def finished(out: Path) -> Shards:
    """Shards that the journal calls finished, with what changes when one is written again."""
    journal, partial = out.with_name(out.name + ".partial.journal"), out.with_name(out.name + ".partial")
    if not journal.exists():
        return {}
    listed = [file for file in partial.glob("*") if f'"{file.name}"' in journal.read_text()]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in listed}
