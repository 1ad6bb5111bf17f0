"""Whatever goes wrong on the way, OUT is whole or not there, one line says why, and the same command resumes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grow.checkpoint.expand import expand
from grow.errors import UserError
from tests.helpers.checkpoints import write_base
from tests.helpers.disturbed import command, driven, finished, line_of
from tests.helpers.tiny import folder_checksums, run


def paused(source: Path, out: Path) -> subprocess.Popen[str]:
    """A run that has written most and now stands still."""
    process = driven("expand", source, out, "1KB", 0.7, "stop")
    while os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        time.sleep(0.01)
    return process


def test_two_runs_write_to_one_target(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base", layers=6), tmp_path / "out"
    process = paused(base, out)
    before = folder_checksums(tmp_path)
    assert "another process is writing" in line_of(*command("expand", base, out, "1KB"))
    assert folder_checksums(tmp_path) == before, "the second left the first alone"
    process.send_signal(signal.SIGCONT)
    process.kill()  # a lock of a dead process is none
    process.communicate()
    kept = finished(out)
    expand(str(base), str(out), max_shard_size="1KB")
    assert kept and all((out / name).stat().st_ino == inode for name, (inode, _) in kept.items())
    with pytest.raises(UserError, match="already there"):
        expand(str(base), str(out))


def in_namespace(script: str, **names: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script that may mount things, which no one else sees and which go with it."""
    grow = f"{shlex.quote(sys.executable)} -m grow"
    lines = [f"{name}={shlex.quote(str(path))}" for name, path in names.items()]
    text = "\n".join(["set -u", f'grow() {{ {grow} "$@"; echo $? >&2; }}', *lines, script])
    return run("unshare", "--map-root-user", "--mount", "bash", "-c", text)


def may_mount() -> bool:
    try:
        tried = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(tried, capture_output=True).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(not may_mount(), reason="no mounts here, not even in a namespace of its own")


@needs_mounts
def test_the_disk_fills(tmp_path: Path) -> None:
    """A full disk is one line; with more room the same command resumes, and what it copied and finished stays."""
    base, disk = write_base(tmp_path / "base", layers=6, hidden=64, width=256), tmp_path / "disk"
    disk.mkdir()
    script = """
    mount -t tmpfs -o size=900k none $disk
    grow expand $base $disk/out --max-shard-size 100KB
    ls $disk
    finished=$(grep -o '"file": "[^"]*' $disk/out.partial.journal | cut -d'"' -f4)
    cd $disk/out.partial && stat -c '%n %i %Y' $finished
    echo and then
    mount -o remount,size=4m $disk
    grow expand $base $disk/out --max-shard-size 100KB > /dev/null
    cd $disk/out && stat -c '%n %i %Y' $finished
    cp -r $disk/out $disk/../kept"""
    done = in_namespace(script, base=base, disk=disk)
    line, first, second = done.stderr.splitlines()
    assert line.startswith("grow: ") and "No space left on device" in line and (first, second) == ("2", "0")
    before, after = done.stdout.split("and then\n")
    assert before == "out.partial\nout.partial.journal\n" + after and "growth-" in after and "model-" in after
    expand(str(base), str(tmp_path / "whole"), max_shard_size="100KB")
    assert folder_checksums(tmp_path / "kept") == folder_checksums(tmp_path / "whole")


@needs_mounts
@pytest.mark.parametrize("kilobytes", [4, 40])
def test_a_disk_too_small_for_anything(kilobytes: int, tmp_path: Path) -> None:
    base, disk = write_base(tmp_path / "base"), tmp_path / "disk"
    disk.mkdir()
    script = f"""
    mount -t tmpfs -o size={kilobytes}k none $disk
    head -c {(kilobytes - 4) * 512} /dev/zero > $disk/filler
    grow expand $base $disk/out > /dev/null
    test ! -e $disk/out"""
    line, code = in_namespace(script, base=base, disk=disk).stderr.splitlines()
    assert line.startswith("grow: ") and "No space left on device" in line and code == "2"


@needs_mounts
def test_the_target_is_read_only(tmp_path: Path) -> None:
    base, disk = write_base(tmp_path / "base"), tmp_path / "disk"
    disk.mkdir()
    script = """
    mount -t tmpfs -o ro none $disk
    grow expand $base $disk/out"""
    line, code = in_namespace(script, base=base, disk=disk).stderr.splitlines()
    assert line.startswith("grow: ") and "Read-only file system" in line and code == "2"


def test_the_target_is_in_a_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in line_of(*command("expand", base, tmp_path / "file" / "out", "5GB"))


@pytest.mark.parametrize("how", ["removed", "cut short"])
def test_the_source_vanishes_midway(how: str, tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base", shards=1, layers=6), tmp_path / "out"
    expand(str(base), str(tmp_path / "grown"))

    def vanish(_: int, __: int) -> None:
        for shard in base.glob("*.safetensors"):
            os.truncate(shard, 100) if how == "cut short" else shard.unlink()

    try:
        expand(str(base), str(out), max_shard_size="1KB", progress=vanish)
    except UserError as error:
        assert "\n" not in str(error) and str(base) in str(error)
        assert not out.exists()
    else:
        assert how == "removed" and folder_checksums(out).keys() >= {"config.json"}  # it was open, and linked


@pytest.mark.parametrize("left", ["out.partial", "out.partial.journal"])
def test_nothing_is_written_through_a_link(left: str, tmp_path: Path) -> None:
    base, elsewhere = write_base(tmp_path / "base"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    (tmp_path / left).symlink_to(elsewhere if left == "out.partial" else elsewhere / "precious")
    with pytest.raises(UserError, match="is a link"):
        expand(str(base), str(tmp_path / "out"))
    assert folder_checksums(elsewhere).keys() == {"precious"} and (elsewhere / "precious").read_text() == "precious"
    (tmp_path / left).unlink()
    if left == "out.partial.journal":
        os.link(elsewhere / "precious", tmp_path / left)
        with pytest.raises(UserError, match="not a file of its own"):
            expand(str(base), str(tmp_path / "out"))
        assert (elsewhere / "precious").read_text() == "precious"


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[1]\n", b"[" * 10**5, b'{"request": 1}\n{"file": "../x"}\n', b"\0"])
def test_a_journal_of_junk(junk: bytes, tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "leftover").symlink_to(base / "config.json")
    (tmp_path / "out.partial.journal").write_bytes(junk)
    before = folder_checksums(base)
    expand(str(base), str(out))
    assert not (out / "leftover").is_symlink() and folder_checksums(base) == before


def test_finished_shards_of_the_journal_are_looked_at(tmp_path: Path) -> None:
    """A finished shard that has since become a link, is gone, or has changed, is written again."""
    base, out = write_base(tmp_path / "base", layers=6), tmp_path / "out"
    process = paused(base, out)
    process.kill()
    process.communicate()
    partial = tmp_path / "out.partial"
    linked, changed, gone = sorted(finished(out))[:3]
    (partial / linked).rename(tmp_path / linked)
    (partial / linked).symlink_to(tmp_path / linked)
    (partial / changed).write_bytes(bytes((partial / changed).stat().st_size))
    (partial / gone).unlink()
    for path in (out, tmp_path / "whole"):
        expand(str(base), str(path), max_shard_size="1KB")
    assert folder_checksums(out) == folder_checksums(tmp_path / "whole")
    assert not (out / linked).is_symlink()
