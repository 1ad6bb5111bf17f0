"""OUT, written so that it is either whole or not there.

Everything goes into OUT.partial/, under a lock; config.json comes last; when all is synced, the folder is renamed to
OUT. A run that was killed left OUT.partial: the next one keeps the shards whose checksums agree and does the rest.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grow.checkpoint.shards import INDEX_NAME, TensorSpec, shard_checksums, write_shard
from grow.errors import UserError

Progress = Callable[[int, int], object]
"""Called while tensors are written, with the bytes just written and the bytes that there are in all."""


def no_progress(written: int, total: int) -> None:
    """Shows nothing."""


_JOURNAL = ".journal.jsonl"
_LOCK = ".lock"


class OutputFolder:
    """The context in which a checkpoint is written.

    `request` describes what is being made of what (JSON); shards of an interrupted run are kept only if it made the
    same. Raises UserError if OUT is there, or if another process is writing it.
    """

    def __init__(self, out: str | os.PathLike[str], request: dict[str, Any]):
        self.out = Path(out)
        refuse_existing(self.out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.fingerprint = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        self.finished: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.out}: another process is writing it; wait for it to end") from None
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror})") from error
        self._recall()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._lock.close()
        if isinstance(error, OSError):
            raise UserError(
                f"{self.partial}: writing stopped ({error.strerror}); mend that and run the same command again: "
                "finished shards are kept"
            ) from error

    def _recall(self) -> None:
        """Keeps the finished shards of an interrupted run of the same request; clears all else away."""
        journal = self.partial / _JOURNAL
        lines = journal.read_text().splitlines() if journal.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        same = bool(entries) and entries[0].get("request") == self.fingerprint
        for entry in entries[1:] if same else []:
            path = self.partial / entry["file"]
            if path.is_file() and shard_checksums(path) == entry["tensors"]:
                self.finished[entry["file"]] = entry
        for path in self.partial.iterdir():
            if path.name not in (*self.finished, _LOCK):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._note({"request": self.fingerprint})
        for entry in self.finished.values():
            self._note(entry)

    def _note(self, entry: dict[str, Any]) -> None:
        with (self.partial / _JOURNAL).open("a") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def write_shards(self, shards: dict[str, list[TensorSpec]], progress: Progress) -> dict[str, str]:
        """Writes shards, but for those that are there already. Returns each tensor's SHA-256."""
        total = sum(spec.nbytes for specs in shards.values() for spec in specs)
        checksums: dict[str, str] = {}
        for name, specs in shards.items():
            if name in self.finished:
                progress(sum(spec.nbytes for spec in specs), total)
            else:
                tensors = write_shard(self.partial / name, specs, lambda count: progress(count, total))
                self.finished[name] = {"file": name, "tensors": tensors}
                self._note(self.finished[name])
            checksums |= self.finished[name]["tensors"]
        return checksums

    def link(self, source: Path, name: str) -> None:
        """Puts `source` into OUT without copying its bytes where the file system allows.

        A hard link; on another file system a copy, which file systems that can (XFS, Btrfs) make as a reflink.
        """
        source, target = source.resolve(), self.partial / name
        try:
            os.link(source, target)
        except OSError:
            with source.open("rb") as reader, target.open("wb") as writer:
                while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                    pass
                os.fsync(writer.fileno())

    def copy(self, source: Path) -> None:
        """Copies a small file (tokenizer, generation config, …) under its own name."""
        shutil.copyfile(source.resolve(), self.partial / source.name)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file and syncs it."""
        with (self.partial / name).open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    def write_index(self, weight_map: dict[str, str], total_size: int) -> None:
        """Writes the index over all shards; `total_size` is in bytes."""
        self.write_json(INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})

    def _finish(self) -> None:
        (self.partial / _JOURNAL).unlink()
        (self.partial / _LOCK).unlink()
        sync_folder(self.partial)
        refuse_existing(self.out)
        self.partial.rename(self.out)
        sync_folder(self.out.parent)


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


def side_files(path: Path) -> list[Path]:
    """The files beside the weights: tokenizer, processor, generation config, chat template, licence."""
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.name != "config.json"
        and file.name != "README.md" and not file.name.endswith(_NOT_CARRIED)
    ]  # fmt: skip
