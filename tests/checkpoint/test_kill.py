"""Killed at any moment: the command run again finishes the work, and what was finished stays."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from tests.helpers.checkpoints import write_base
from tests.helpers.disturbed import command, driven, finished, start
from tests.helpers.tiny import folder_checksums

RUN: dict[str, Callable[..., object]] = {"expand": expand, "consolidate": consolidate}


class Killing:
    """Kills runs of one command on one checkpoint, and has them finish."""

    def __init__(self, name: str, source: Path, size: str, folder: Path):
        self.name, self.source, self.size, self.folder = name, source, size, folder
        self.whole = folder / "whole"
        self.writing = self.undisturbed()
        self.expected = folder_checksums(self.whole)
        self.kept = self.unfinished = 0

    def undisturbed(self) -> float:
        """Makes what is expected. Returns how long writing took, in seconds."""
        shutil.rmtree(self.whole, ignore_errors=True)
        process, begun = self.begin(self.whole)
        assert process.wait() == 0
        return time.monotonic() - begun

    def begin(self, out: Path) -> tuple[subprocess.Popen[str], float]:
        """A run that has just begun to write, and since when."""
        process = start(*command(self.name, self.source, out, self.size))
        while process.poll() is None and not out.with_name(out.name + ".partial").exists():
            time.sleep(0.001)
        return process, time.monotonic()

    def at_byte(self, place: float) -> None:
        """Killed by itself when that part of all bytes is written."""
        out = self.folder / "killed"
        process = driven(self.name, self.source, out, self.size, place, "kill")
        assert process.wait() == -signal.SIGKILL, process.communicate()[1]
        self.goes_on(out)

    def at_time(self, place: float) -> None:
        """Killed from outside, at that part of the time that writing takes."""
        out = self.folder / "killed"
        process, _ = self.begin(out)
        time.sleep(place * self.writing)
        process.kill()
        process.communicate()
        self.goes_on(out)

    def goes_on(self, out: Path) -> None:
        if out.exists():  # the kill came after the renaming
            assert folder_checksums(out) == self.expected
        else:
            before = finished(out)
            RUN[self.name](str(self.source), str(out), max_shard_size=self.size)
            after = {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in before}
            assert after == before, "a finished shard was written again"
            self.kept += len(before)
            self.unfinished += 1
        assert folder_checksums(out) == self.expected
        assert not out.with_name(out.name + ".partial").exists()
        shutil.rmtree(out)
        out.with_name(out.name + ".partial.journal").unlink(missing_ok=True)


def killed(name: str, folder: Path, size: str, kills: int, base: Callable[[Path], Path]) -> None:
    source = base(folder / "base")
    if name == "consolidate":
        expand(str(source), str(folder / "grown"))
        source = folder / "grown"
    killing = Killing(name, source, size, folder)
    chance = random.Random(name)
    places = [(number + chance.random()) / kills for number in range(kills)]
    for number, place in enumerate(places):
        (killing.at_time if number % 2 else killing.at_byte)(place)
    print(f"{name}: {kills} kills, {killing.unfinished} resumed, {killing.kept} finished shards kept")
    assert killing.kept > 0


@pytest.mark.parametrize("name", ["expand", "consolidate"])
def test_killed_at_any_moment(name: str, tmp_path: Path) -> None:
    killed(name, tmp_path, "100KB", 4, lambda path: write_base(path, layers=6, hidden=64, width=256))


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["expand", "consolidate"])
def test_killed_fifty_times(name: str, tmp_path: Path) -> None:
    """On some 200 MB."""
    killed(name, tmp_path, "15MB", 50, lambda path: write_base(path, layers=12, hidden=1024, width=2752))


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["expand", "consolidate"])
def test_killed_at_the_shape_of_the_1b(name: str, tmp_path: Path) -> None:
    killed(name, tmp_path, "200MB", 1, lambda path: write_base(path, layers=26, hidden=1152, width=6912))
