"""RUN/run.json says what a run is: its recipe with every default, the checksums of what it starts from and learns from,
versions. A run that resumes must be the same run."""

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn
from xxhash import xxh3_128

from grow.checkpoint.files import write_json
from grow.checkpoint.shards import Checkpoint, read_json
from grow.checkpoint.switch_record import SwitchRecord
from grow.checkpoint.writer import file_checksums
from grow.data.of_recipe import template_of
from grow.data.packing import PackedDataset
from grow.errors import UserError
from grow.methods import Method
from grow.recipe import Recipe
from grow.training.compiling import compiles
from grow.training.liger import uses_liger
from grow.training.same_run import NAME, places

_CHECKSUMS = 2  # of rows: how they are computed
_MADE = "made.json"
_SECONDS = 60
"""How long a run waits for another process of it to end."""
_LIBRARIES = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "peft")


def first_day(run: Path) -> str:
    """Returns the day of the run's first start, such as 2026-11-28: today, unless it has begun."""
    begun = read_json(run / NAME).get("day") if (run / NAME).exists() else None
    return begun or date.today().isoformat()


def made_once(run: Path, method: Method, recipe: Recipe) -> Any:
    """Returns what a method makes before the model is loaded, as the run has it or else made now; rank 0 calls it."""
    if (run / NAME).exists() and (run / _MADE).exists():  # else it is of an attempt that never began
        return read_json(run / _MADE)["made"]
    made = method.make(recipe)
    if made is not None:
        write_json(run / _MADE, {"made": made})
    return made


def write_run_file(
    run: Path,
    recipe: Recipe,
    start: Checkpoint,
    data: dict[str, PackedDataset],
    dtype: str,
    model: nn.Module,
    switch: SwitchRecord | None,
    made: Any,
    micro_batch: int,
) -> None:
    """Writes run.json on rank 0; every rank calls it. `data` has the sequences of each split; `made` is what the method
    made (made_once), of which the checksum is kept; `micro_batch` how many sequences a device has at a time.

    Raises UserError, on every rank, if the folder holds a run that started from other weights or learnt other rows.
    """
    before = from_rank_0(lambda: _before(run))
    version = _version(before)
    facts = {
        "recipe": recipe.values(),
        "start": str(start.path.resolve()),
        "start_checksums": from_rank_0(lambda: {file.name: file_checksums(file)[0] for file in start.shards}),
        **data_facts(data, version),
        "day": recipe.day,
        "chat_template": template_of(recipe).chat_template,
        **places(recipe),
        "growth": recipe.make_method().grows,
        "switch": None if switch is None else {name: v for name, v in switch.values().items() if name != "weight"},
        "made_checksum": None if made is None else xxh3_128(json.dumps(made).encode()).hexdigest(),
        "world_size": dist.get_world_size(),
        "per_device_train_batch_size": micro_batch,
        "attn_implementation": model.config.get_text_config()._attn_implementation,  # type: ignore[union-attr,operator]
        "compiled": compiles(recipe),
        "liger": uses_liger(recipe, str(model.config.model_type)),  # type: ignore[union-attr]
        "dtype": dtype,
        "device": device_name(),
        "trained_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
        "git_commit": _commit(),
        "versions": {name: installed_version(name) for name in _LIBRARIES},
    }
    _check_contents(run, before, facts, "start_checksums")
    if dist.get_rank() == 0:
        for name in ("attn_implementation", "compiled", "liger"):
            if before and before.get(name, facts[name]) != facts[name]:
                print(
                    f"{run}: began with {name} {before[name]}, and goes on with {facts[name]}, which is what this "
                    "machine has: not in the same bits",
                    file=sys.stderr,
                )
        write_json(run / NAME, facts)


def _before(run: Path) -> dict[str, Any]:
    return read_json(run / NAME) if (run / NAME).exists() else {}


def _version(before: dict[str, Any]) -> int:
    return int(before.get("data_checksums_version", 1)) if before else _CHECKSUMS


def check_rows(run: Path, data: dict[str, PackedDataset]) -> None:
    """Raises UserError if the folder holds a run that learnt other rows."""
    before = _before(run)
    if before:
        _check_contents(run, before, data_facts(data, _version(before)), "data_checksums")


def _check_contents(run: Path, before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    there = _placed(now[what])
    for name, checksum in _placed(before.get(what, {})).items():
        if there.get(name) != checksum:
            raise UserError(
                f"{run}: holds a run that began with other contents of {name} ({what}); "
                "put them back, or give another --output_dir"
            )


def _placed(checksums: dict[str, str]) -> dict[str, str]:
    """Calls the data sets that are mixed in by their place, since their folders may have moved."""
    mixed = [name for name in checksums if name.startswith("mix: ")]
    return {f"mix {mixed.index(name) + 1}" if name in mixed else name: value for name, value in checksums.items()}


def data_facts(data: dict[str, PackedDataset], version: int) -> dict[str, Any]:
    """Returns what tells the rows of each split from others."""
    sums = {split: rows_checksum(sequences, version) for split, sequences in data.items()}
    return {"data_checksums": sums, "data_checksums_version": version}


def rows_checksum(sequences: PackedDataset, version: int = _CHECKSUMS) -> str:
    """Returns XXH3-128 of the tokens and labels of all rows, in their order. Runs begun before there was a version 2
    keep version 1."""
    if version > 1:
        return sequences.examples.checksum()
    digest = xxh3_128()
    for example in sequences.examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Calls `make` on rank 0 alone, and returns its result on every rank, or raises its UserError; all ranks call
    this."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


class Claim:
    """Keeps a run's folder for this process, until that ends."""

    def __init__(self, run: Path):
        self.run = run
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Locks RUN/.lock, unless this has been done, and says whether it was not; waits for another process that is
        about to end. Raises UserError for one that goes on. A file system without locks keeps nobody out."""
        if self._file is not None:
            return False
        self.run.mkdir(parents=True, exist_ok=True)
        self._file = (self.run / ".lock").open("w")
        for _ in range(_SECONDS):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(1)
            except OSError:
                return True
        raise UserError(f"{self.run}: another process trains this run; wait for it, or give another output_dir")


def device_name() -> str:
    """Returns a GPU's name, or the capability of a processor's vector units, as torch sees them."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git, as in a container
        return None
