"""The folder of a training run: which of its checkpoints are complete, and whole.

RUN/checkpoint-N/COMPLETE     written last: the bytes and the checksum of every other file of the checkpoint
RUN/COMPLETE                  written last of all: the run is done
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from xxhash import xxh3_128

from grow.checkpoint.output import sync
from grow.checkpoint.shards import read_json
from grow.errors import UserError

MARKER = "COMPLETE"
Facts = list[int | str]
"""A file's bytes and its XXH3-128."""


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, the newest first."""
    return sorted((marker.parent for marker in run.glob(f"checkpoint-*/{MARKER}")), key=step_of, reverse=True)


def last_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run. Raises UserError if there is none."""
    complete = complete_checkpoints(run)
    if not complete:
        raise UserError(f"{run}: the run has no complete checkpoint yet")
    return complete[0]


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N; −1 of any other name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def validation_losses(checkpoint: Path) -> list[tuple[int, float]]:
    """Step and validation loss, as often as it was measured until a checkpoint of a run."""
    history = read_json(checkpoint / "trainer_state.json")["log_history"]
    return [(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def settle(checkpoint: Path, rank: int, written: Mapping[Path, Facts]) -> dict[str, Facts]:
    """Makes the files that a rank wrote durable. Returns their bytes and checksums, by name.

    Each rank its own, since only on its own node they are still in memory. `written` has those of files that are
    durable already.
    """
    files: dict[str, Facts] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        writer = re.search(r"zero_pp_rank_(\d+)_|rng_state_(\d+)\.", name)
        if path.is_file() and int(writer[1] or writer[2] if writer else 0) == rank:
            files[name] = written.get(path) or _settle(path)
    return files


def _settle(path: Path) -> Facts:
    sync(path)
    return [path.stat().st_size, _checksum(path)]


def seal(checkpoint: Path, files: dict[str, Facts]) -> None:
    """Marks a checkpoint as complete: it holds these files (what settle returned, of all ranks)."""
    write_marker(checkpoint / MARKER, json.dumps({"files": files}))


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a complete checkpoint, in a few words; None if it is whole."""
    try:
        for name, (size, checksum) in read_json(checkpoint / MARKER)["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _checksum(path) != checksum:
                return f"{name} changed since it was written"
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    return None


def write_marker(path: Path, text: str = "") -> None:
    """Writes a file that says that all before it is there: whole or not at all, and durably."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def _checksum(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
