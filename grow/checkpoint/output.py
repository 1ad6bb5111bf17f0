"""The folder OUT is written so that it is either whole or not there.

    OUT.partial/           holds everything while it is written; config.json comes last
    OUT.partial.journal    lists what is finished in it; locked while a process writes
    OUT                    is OUT.partial, renamed when all is synced

A run that was killed leaves the first two: the next one keeps the shards whose checksums agree and writes the others.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from grow.checkpoint.journal import Journal
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.shards import INDEX_NAME, plain_name, refuse_devices
from grow.checkpoint.writer import file_checksums, write_shard
from grow.errors import UserError

Progress = Callable[[int, int], object]
"""Called while tensors are written, with the bytes just written and the bytes that there are in all."""


def no_progress(written: int, total: int) -> None:
    """Shows nothing."""


class OutputFolder:
    """Provides the context in which a checkpoint is written.

    `request` says, as JSON, what is made from which source; shards of an interrupted run are kept only if its request
    was the same. Raises UserError if OUT is there, if another process is writing it, or if the disk does not take it.
    """

    def __init__(self, out: str | os.PathLike[str], request: dict[str, Any]):
        self.out = Path(out)
        refuse_existing(self.out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._journal_path = self.out.with_name(self.out.name + ".partial.journal")
        self.fingerprint = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        self.finished: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        for path in (self.partial, self._journal_path):
            if path.is_symlink():
                raise UserError(f"{path}: is a link, and nothing is written through links; remove it")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self._journal_path)
            try:
                self._recall()
            except BaseException:
                self.journal.close()
                raise
        except OSError as error:
            raise UserError(f"{error.filename or self.partial}: cannot be written ({error.strerror})") from error
        return self

    def _recall(self) -> None:
        """Keeps the finished shards of an interrupted run of the same request; removes everything else."""
        if os.path.lexists(self.out):  # another process has finished it meanwhile
            self.journal.remove()
            refuse_existing(self.out)
        entries = self.journal.recall(self.fingerprint)
        self.partial.mkdir(exist_ok=True)
        self.finished = {entry["file"]: entry for entry in entries if _intact(self.partial, entry)}
        for path in self.partial.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _finished(self, name: str, tensors: dict[str, str]) -> None:
        self.finished[name] = {"file": name, "tensors": tensors}
        self.journal.note(self.finished[name])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failed:
            error = failed
        finally:
            if isinstance(error, UserError):  # to run it again would not help: nothing is left behind
                shutil.rmtree(self.partial, ignore_errors=True)
                self.journal.remove()
            self.journal.close()
        if isinstance(error, OSError):
            where = f" at {error.filename}" if error.filename else ""
            raise UserError(
                f"{self.partial}: writing stopped{where} ({error.strerror}); mend that and run the same command again: "
                "finished shards are kept"
            ) from error

    def _finish(self) -> None:
        with ThreadPoolExecutor() as workers:  # at once, so that the file system's journal takes them together
            list(workers.map(sync, (*self.partial.rglob("*"), self.partial)))
        self.partial.rename(self.out)
        sync(self.out.parent)
        self.journal.remove()

    def write_shards(self, shards: Mapping[str, Mapping[str, LazyTensor]], progress: Progress) -> dict[str, str]:
        """Writes shards, as many at a time as there are processors; those that are finished already are skipped.

        Returns each tensor's checksum.
        """
        processors = len(os.sched_getaffinity(0))
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
                # A second thread for a shard helps only where processors are left.
                made = write_shard(self.partial / name, shards[name], wrote, ahead=len(shards) < processors)
                self._finished(name, made)
            return self.finished[name]["tensors"]

        with ThreadPoolExecutor(min(len(shards), processors)) as workers:
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
        """Puts `source` into OUT as a hard link where the file system allows, else as a copy.

        A copy counts as a finished shard when a run is resumed.
        """
        source, target = source.resolve(), self.partial / name
        if name in self.finished:
            return
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:
            self._copy(source, target)
            sync(target)
            self._finished(name, file_checksums(target)[1])

    def copy(self, source: Path, name: str = "") -> None:
        """Copies a small file (tokenizer, generation config, …) under its own name or another, a folder included."""
        target = self.partial / (name or source.name)
        target.parent.mkdir(exist_ok=True)
        self._copy(source.resolve(), target)

    # Only new files are opened, here and in write_shard: a name that is taken may be a link to the base's own file.

    def _copy(self, source: Path, target: Path) -> None:
        refuse_devices(source)
        with source.open("rb") as original, target.open("xb") as file:
            shutil.copyfileobj(original, file, 2**20)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file."""
        with (self.partial / name).open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_index(self, files: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        """Writes the index over all shards: the file of each tensor, and the total of their bytes."""
        total = sum(sizes[name] for name in files)
        self.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(files)})


def _intact(folder: Path, entry: dict[str, Any]) -> bool:
    try:
        path = folder / plain_name(entry.get("file"), folder)
        return not path.is_symlink() and path.is_file() and file_checksums(path)[1] == entry.get("tensors")
    except UserError:
        return False


def refuse_existing(out: Path) -> None:
    """Raises UserError if `out` is there already."""
    if os.path.lexists(out):
        raise UserError(f"{out}: already there; choose another name or remove it")


# Errors of opening or syncing a folder where the file system does not support it (CIFS, FUSE, some network ones).
_NO_FOLDER_SYNC = (
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR,
    errno.ENOTTY,
)  # fmt: skip


def sync(path: Path) -> None:
    """Makes a file durable, or a folder's entries where the file system supports it. Raises OSError if it fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise


# Weights in other formats, and files that describe weights, are not copied with a checkpoint's small files.
_NOT_CARRIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json",
    ".partial.journal",
)  # fmt: skip
_OURS = ("config.json", "growth.json", "README.md")


def side_files(path: Path) -> list[Path]:
    """Returns the files beside the weights: tokenizer, processor, generation config, chat template, licence."""
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.name not in _OURS
        and not file.name.endswith(_NOT_CARRIED)
    ]  # fmt: skip
