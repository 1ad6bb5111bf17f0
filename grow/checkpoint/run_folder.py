"""The folder of a training run: which of its checkpoints are complete and not corrupted.

RUN/checkpoint-N/COMPLETE     written last: the bytes and the checksum of every other file of the checkpoint
RUN/COMPLETE                  written last of all: the run is done
"""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grow.checkpoint.files import checksum
from grow.checkpoint.output import sync
from grow.checkpoint.shards import read_json
from grow.errors import UserError

MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
# The beginnings of names of files that an attempt which died may have left.
_WRITTEN = re.compile(
    r"global_step\d+/|latest|zero_to_\w+\.py$|(scheduler|optimizer)\.pt$|rng_state|trainer_state\.json$"
    r"|training_args\.bin$|COMPLETE"
)
Facts = list[int | str]
"""A file's bytes and its XXH3-128."""


def own_checkpoints(run: Path) -> list[Path]:
    """Returns the paths named like a checkpoint of a run, complete or not, the newest first. A folder of any other
    name, checkpoint-2-keep or checkpoint-007, is someone's copy."""
    return sorted((path for path in run.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)


def complete_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints of a run that were written to their end, the newest first."""
    return [path for path in own_checkpoints(run) if (path / MARKER).is_file()]


def last_checkpoint(run: Path) -> Path:
    """Returns the newest complete checkpoint of a run. Raises UserError if there is none."""
    complete = complete_checkpoints(run)
    if not complete:
        raise UserError(f"{run}: the run has no complete checkpoint yet")
    return complete[0]


def final_checkpoint(run: Path) -> Path:
    """Returns the checkpoint of a run that counts: the newest complete one or, with `keep_best`, that with the lowest
    validation loss. Raises UserError if there is none."""
    last = last_checkpoint(run)
    if not read_json(run / "run.json").get("recipe", {}).get("keep_best"):
        return last
    there = {step_of(path): path for path in complete_checkpoints(run)}
    return there.get(best_step([one for one in validation_losses(last) if one[0] in there]), last)


def counting_checkpoints(run: Path, average: int = 0) -> list[Path]:
    """Returns the checkpoints whose mean is what a run ends in, the newest first: the last `average` ones or, for 0, as
    many as its recipe says, if it has made so many, which may be the one that counts alone. Raises UserError if they
    are not there.

    Of a run whose recipe says so, one that it has made because it was preempted is not among them: it resumes to the
    same result as without.
    """
    recipe = read_json(run / "run.json").get("recipe", {})
    wanted = average or int(recipe.get("average", 1))
    if wanted == 1:
        return [final_checkpoint(run)]
    # A run that was not to be averaged has kept whatever it made.
    every = int(recipe["save_steps"]) if recipe.get("average", 1) > 1 else 1
    found = due_checkpoints(run, every)[:wanted]
    if not found:
        last_checkpoint(run)  # says so
    if len(found) < average:
        raise UserError(
            f"{run}: {len(found)} complete checkpoints are there, and a mean of {wanted} is wanted (the recipe's "
            "save_steps and save_total_limit say how many a run keeps; --average takes fewer)"
        )
    return found


def due_checkpoints(run: Path, every: int) -> list[Path]:
    """Returns the complete checkpoints after each so many steps, and the newest of all, the newest first."""
    complete = complete_checkpoints(run)
    return complete[:1] + [path for path in complete[1:] if step_of(path) % every == 0]


def step_of(checkpoint: Path) -> int:
    """Returns N of checkpoint-N, as a run writes it; −1 for any other name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def steps_in(checkpoint: Path) -> int:
    """Returns the step after which a checkpoint was written, whatever its name. Raises UserError if it does not say."""
    step = read_json(checkpoint / "trainer_state.json").get("global_step")
    if type(step) is not int:
        raise UserError(f"{checkpoint}: its trainer_state.json does not say after how many steps it was written")
    return step


def strange_files(checkpoint: Path) -> list[str]:
    """Returns the names of files in a checkpoint's folder that no run wrote there; the checkpoint's own name if it is a
    link or a file. The marker of a complete checkpoint says what was written."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return [checkpoint.name]
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_symlink() or path.is_file()}
    with contextlib.suppress(UserError, AttributeError):
        written = read_json(checkpoint / MARKER).get("files", {}).keys()
        return sorted(there - written - {MARKER})
    return sorted(name for name in there if not _WRITTEN.match(name))


def clear_place(path: Path) -> None:
    """Makes room for a checkpoint. What a run that died has left there is removed; anything else is someone's, and is
    kept under another name."""
    if os.path.lexists(path):
        if strange_files(path):
            set_aside(path)
        else:
            shutil.rmtree(path)


def set_aside(path: Path) -> None:
    """Renames what is there, and says so: it may not be a run's own."""
    names = (path.with_name(f"{path.name}.kept{end}") for end in ("", *(f"-{n}" for n in range(2, 1000))))
    other = next(name for name in names if not os.path.lexists(name))
    path.rename(other)
    print(f"{path}: something else was there; it is {other.name} now", file=sys.stderr)


def remove_old_checkpoints(run: Path, newest: int, limit: int, best: int = 0, every: int = 1) -> None:
    """Keeps the last `limit` checkpoints up to step `newest`, which has just been written, and that of step `best`, and
    removes those before them, except any that hold files which no run wrote. Older ones than the newest are kept only
    where their step is a multiple of `every`."""
    kept = [path for path in due_checkpoints(run, every) if step_of(path) <= newest][:limit]
    for path in own_checkpoints(run):
        if step_of(path) < newest and step_of(path) != best and path not in kept and not strange_files(path):
            shutil.rmtree(path)


def validation_losses(checkpoint: Path) -> list[tuple[int, float]]:
    """Returns step and validation loss of every validation up to a checkpoint of a run."""
    return losses_of(read_json(checkpoint / "trainer_state.json")["log_history"])


def losses_of(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Returns step and loss of every validation in a Trainer's history."""
    return [(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def best_step(losses: list[tuple[int, float]]) -> int:
    """Returns the step with the lowest validation loss, of several the first, and not the start; 0 if there is none."""
    known = (one for one in losses if one[0] and math.isfinite(one[1]))
    return min(known, key=lambda one: (one[1], one[0]), default=(0, 0.0))[0]


def fsync_and_hash(checkpoint: Path, rank: int, written: Mapping[Path, Facts]) -> dict[str, Facts]:
    """Makes the files that a rank wrote durable. Returns their bytes and checksums, by name.

    Each rank handles its own files, which are still in the memory of its node alone. `written` has the facts of files
    that are durable already.
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
    return [path.stat().st_size, checksum(path)]


def mark_complete(checkpoint: Path, files: dict[str, Facts]) -> None:
    """Marks a checkpoint as complete: it holds these files (what fsync_and_hash returned, of all ranks)."""
    write_marker(checkpoint / MARKER, json.dumps({"files": files}))


def find_corruption(checkpoint: Path) -> str | None:
    """Returns what is wrong with a complete checkpoint, in a few words; None if nothing is."""
    try:
        for name, (size, digest) in read_json(checkpoint / MARKER)["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or checksum(path) != digest:
                return f"{name} changed since it was written"
        if steps_in(checkpoint) != step_of(checkpoint):
            return f"was written after step {steps_in(checkpoint)}"
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    return None


def write_marker(path: Path, text: str = "") -> None:
    """Writes a file that marks everything before it as done: whole or not at all, and durably."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)
