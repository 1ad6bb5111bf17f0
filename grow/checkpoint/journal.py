"""The journal of a folder that is being written: a file beside it, one JSON object a line, locked by the writer.

The first line says what is being made; each further line names a finished shard, with its tensors' checksums. The lock
ends with the process, however that ends.
"""

import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from grow.checkpoint.writer import write_all
from grow.errors import UserError

# Where the file system cannot lock (Lustre without flock, say).
_NOT_SUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Journal:
    """Opens and locks a journal. Raises UserError if another process writes it, or if it is a link or no regular
    file."""

    def __init__(self, path: Path):
        self.path = path
        self._noting = Lock()
        while True:
            self._descriptor = self._open()
            # Between opening and locking, the process that held the lock may have finished and removed the file.
            if self._is_there():
                break
            self.close()
        found = os.fstat(self._descriptor)
        if found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
            self.close()
            raise UserError(f"{path}: not a file of its own; remove it")

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{self.path}: another process is writing here; wait for it to end") from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            print(f"{self.path}: this file system has no locks; see that nothing else writes here", file=sys.stderr)
        return descriptor

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def recall(self, request: str) -> list[dict[str, Any]]:
        """Returns the shards' entries if the request is the same; otherwise empties the journal and begins anew."""
        with open(self._descriptor, "rb", closefd=False) as file:
            lines = file.read().splitlines(keepends=True)
        entries = list(_entries(lines))
        if not entries or entries[0].get("request") != request:
            entries = []
        # The entries are kept in place, so that no finished shard is lost if the process is killed here.
        os.ftruncate(self._descriptor, sum(map(len, lines[: len(entries)])))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if not entries:
            self.note({"request": request})
        return entries[1:]

    def note(self, entry: dict[str, Any]) -> None:
        """Adds a line and makes it durable."""
        with self._noting:
            write_all(self._descriptor, json.dumps(entry).encode() + b"\n")
            os.fsync(self._descriptor)

    def remove(self) -> None:
        """Removes the file; the lock on it still holds."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file, which unlocks it."""
        os.close(self._descriptor)


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the lines' entries, up to a line that was being written when the process died."""
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(entry, dict) or not line.endswith(b"\n"):
            return
        yield entry
