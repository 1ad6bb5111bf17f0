"""OUT, written so that it is either whole or not there.

    OUT.partial/           everything goes in here; config.json comes last
    OUT.partial.journal    what is finished in it; locked while a process writes
    OUT                    OUT.partial, renamed when all is synced

A run that was killed leaves the first two: the next one keeps the shards whose checksums agree and does the rest.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from grow.checkpoint.lazy import Lazy
from grow.checkpoint.shards import INDEX_NAME
from grow.checkpoint.writer import file_checksums, write_shard
from grow.errors import UserError

Progress = Callable[[int, int], object]
"""Called while tensors are written, with the bytes just written and the bytes that there are in all."""


def no_progress(written: int, total: int) -> None:
    """Shows nothing."""


# Where the file system cannot lock (Lustre without flock, say).
_NOT_SUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class OutputFolder:
    """The context in which a checkpoint is written.

    `request` describes what is being made of what (JSON); shards of an interrupted run are kept only if it made the
    same. Raises UserError if OUT is there, if another process is writing it, or if the disk does not take it.
    """

    def __init__(self, out: str | os.PathLike[str], request: dict[str, Any]):
        self.out = Path(out)
        refuse_existing(self.out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.journal = self.out.with_name(self.out.name + ".partial.journal")
        self.fingerprint = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        self.finished: dict[str, dict[str, Any]] = {}
        self._noting = Lock()

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock()
            refuse_existing(self.out)  # another process may have finished it meanwhile
            self._recall()
        except OSError as error:
            raise UserError(f"{error.filename or self.partial}: cannot be written ({error.strerror})") from error
        return self

    def _lock(self) -> None:
        while True:
            descriptor = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(f"{self.out}: another process is writing it; wait for it to end") from None
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
                print(f"{self.out}: this file system has no locks; see that nothing else writes it", file=sys.stderr)
            # Between opening and locking, the process that held the lock may have finished and removed the file.
            if self.journal.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.journal)):
                self._file = os.fdopen(descriptor, "r+", encoding="utf-8")
                return
            os.close(descriptor)

    def _recall(self) -> None:
        """Keeps the finished shards of an interrupted run of the same request; clears all else away."""
        entries = []
        for line in self._file.read().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:  # the line that was being written when the process died
                break
        if self.partial.is_symlink():
            raise UserError(f"{self.partial}: is a link, and nothing is written through links; remove it")
        self.partial.mkdir(exist_ok=True)
        for entry in entries[1:] if entries and entries[0].get("request") == self.fingerprint else []:
            path = self.partial / entry["file"]
            if path.is_file() and _intact(path, entry["tensors"]):
                self.finished[entry["file"]] = entry
        for path in self.partial.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._file.seek(0)
        self._file.truncate()
        self._note({"request": self.fingerprint})
        for entry in self.finished.values():
            self._note(entry)

    def _note(self, entry: dict[str, Any]) -> None:
        with self._noting:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failed:
            error = failed
        finally:
            if isinstance(error, UserError):  # to run it again would not help: nothing is left behind
                shutil.rmtree(self.partial, ignore_errors=True)
                self.journal.unlink(missing_ok=True)
            self._file.close()
        if isinstance(error, OSError):
            where = f" at {error.filename}" if error.filename else ""
            raise UserError(
                f"{self.partial}: writing stopped{where} ({error.strerror}); mend that and run the same command again: "
                "finished shards are kept"
            ) from error

    def _finish(self) -> None:
        sync_folder(self.partial)
        self.partial.rename(self.out)
        sync_folder(self.out.parent)
        self.journal.unlink()

    def write_shards(self, shards: Mapping[str, Mapping[str, Lazy]], progress: Progress) -> dict[str, str]:
        """Writes shards, but for those that are there already, as many at a time as there are processors.

        Returns each tensor's checksum.
        """
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        showing, stopped = Lock(), False

        def wrote(count: int) -> None:
            if stopped:
                raise InterruptedError
            with showing:
                progress(count, total)

        def write(name: str) -> dict[str, str]:
            if name in self.finished:
                wrote(sum(tensor.nbytes for tensor in shards[name].values()))
            else:
                tensors = write_shard(self.partial / name, shards[name], wrote)
                self.finished[name] = {"file": name, "tensors": tensors}
                self._note(self.finished[name])
            return self.finished[name]["tensors"]

        with ThreadPoolExecutor(min(len(shards), len(os.sched_getaffinity(0)))) as workers:
            futures = [workers.submit(write, name) for name in shards]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stopped = True  # the other workers stop at their next block
                workers.shutdown(wait=True, cancel_futures=True)
                raise
        return {name: checksum for future in futures for name, checksum in future.result().items()}

    def link(self, source: Path, name: str) -> None:
        """Puts `source` into OUT without copying its bytes where the file system allows.

        A hard link; on another file system a copy, which counts as a finished shard when a run is resumed.
        """
        source, target = source.resolve(), self.partial / name
        if name in self.finished:
            return
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
            with target.open("rb+") as file:
                os.fsync(file.fileno())
            self.finished[name] = {"file": name, "tensors": file_checksums(target)[1]}
            self._note(self.finished[name])

    def copy(self, source: Path, name: str = "") -> None:
        """Copies a small file (tokenizer, generation config, …) under its own name or another, a folder included."""
        target = self.partial / (name or source.name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.resolve(), target)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file and syncs it."""
        with (self.partial / name).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file and syncs it."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_index(self, files: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        """Writes the index over all shards: the file of each tensor, and its bytes."""
        total = sum(sizes[name] for name in files)
        self.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(files)})


def _intact(path: Path, tensors: dict[str, str]) -> bool:
    try:
        return file_checksums(path)[1] == tensors
    except UserError:
        return False


def refuse_existing(out: Path) -> None:
    """Raises UserError if `out` is there already."""
    if os.path.lexists(out):
        raise UserError(f"{out}: already there; choose another name or remove it")


def sync_folder(path: Path) -> None:
    """Makes a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Weights in other formats, and what describes weights, are not carried along with a checkpoint's small files.
_NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_OURS = ("config.json", "growth.json", "README.md")


def side_files(path: Path) -> list[Path]:
    """The files beside the weights: tokenizer, processor, generation config, chat template, licence."""
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.name not in _OURS
        and not file.name.endswith(_NOT_CARRIED)
    ]  # fmt: skip
