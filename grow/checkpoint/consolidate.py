"""A training run, or a grown checkpoint → a stock checkpoint that loads anywhere, or a grown one.

Stock: gate and up of base and copies stand one below the other, down side by side as [D/k, D'], and the model's
intermediate_size is k·p. One tensor is in memory at a time.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.expand import MAX_SHARD_SIZE, grown_name
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Checkpoint, TensorSpec, read_json, split_into_shards
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError
from grow.plan import GrowthPlan, canonical, mlp_prefixes, text_config

FORMATS = ("stock", "grown")


@dataclass
class Source:
    """A checkpoint on disk with what training changed laid over it."""

    checkpoint: Checkpoint
    trained: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # by the name on disk; fp32 master weights
    facts: dict[str, Any] = field(default_factory=dict)  # of the training, for the growth's metadata
    identity: list[Any] = field(default_factory=list)

    def read(self, name: str) -> Tensor:
        """The tensor as trained, in the checkpoint's dtype: a master weight is rounded once, here."""
        if name in self.trained:
            return self.trained[name]().to(self.checkpoint.tensors[name].dtype)
        return self.checkpoint.read(name)


def open_source(path: str) -> Source:
    """Opens a run, one of a run's checkpoints, or a grown checkpoint. Raises UserError for anything else."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "run.json").exists():
        complete = sorted(folder.glob("checkpoint-*/COMPLETE"), key=lambda file: int(file.parent.name.split("-")[1]))
        if not complete:
            raise UserError(f"{folder}: the run has no complete checkpoint yet")
        return _open_run(folder, complete[-1].parent)
    if (folder.parent / "run.json").exists() and folder.name.startswith("checkpoint-"):
        if not (folder / "COMPLETE").exists():
            raise UserError(f"{folder}: the checkpoint is not complete; take another of {folder.parent}")
        return _open_run(folder.parent, folder)
    if (folder / "config.json").exists():
        checkpoint = Checkpoint(folder)
        if GrowthPlan.from_config(checkpoint.config) is None:
            raise UserError(f"{folder}: is a stock checkpoint already; nothing to consolidate")
        return Source(
            checkpoint, facts=checkpoint.config["growth"].get("trained") or {}, identity=checkpoint.identity()
        )
    raise UserError(f"{folder}: neither a training run (run.json) nor a grown checkpoint (config.json)")


def _open_run(run: Path, zero_path: Path) -> Source:
    facts = read_json(run / "run.json")
    start = Checkpoint(facts["start"])
    zero = ZeroCheckpoint(zero_path)
    on_disk = {canonical(name): name for name in start.tensors}
    trained: dict[str, Callable[[], Tensor]] = {}
    for name, shape in zero.shapes.items():
        key = on_disk.get(canonical(name))
        if key is None or start.tensors[key].shape != shape:
            raise UserError(f"{zero_path}: {name} {list(shape)} has no counterpart in {start.path}; was that replaced?")
        trained[key] = partial(zero.read, name)
    step = int(zero_path.name.split("-")[1])
    about = {"method": facts["recipe"]["method"], "steps": step, "data": facts["recipe"]["data"]}
    stamp = (zero_path / "COMPLETE").stat().st_mtime_ns
    return Source(start, trained, about, [*start.identity(), str(zero_path.resolve()), stamp])


def consolidate(
    path: str, out: str, format: str = "stock", uniform: bool = False, progress: Progress = no_progress
) -> dict[str, Any]:
    """Writes OUT. Raises UserError if the source cannot be made into that, or if OUT is there.

    `uniform`: where only some layers are grown, the others get neurons that are zero, which changes nothing they
    compute, so that one intermediate_size holds for all.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: there are {' and '.join(FORMATS)}")
    refuse_existing(Path(out))
    source = open_source(path)
    plan = GrowthPlan.from_config(source.checkpoint.config)
    if format == "grown":
        if plan is None:
            raise UserError(f"{path}: was not trained by growth, so there is nothing to keep grown; use --format stock")
        written = _write_grown(source, out, progress)
    else:
        written = _write_stock(source, plan, out, uniform, progress)
    return {"source": path, "out": out, "format": format, "bytes": written, **source.facts}


def _write_stock(source: Source, plan: GrowthPlan | None, out: str, uniform: bool, progress: Progress) -> int:
    checkpoint = source.checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "growth"}
    if plan is None:
        specs = [_same(source, name) for name in checkpoint.tensors]
    else:
        specs = _merged(source, plan, uniform)
        text = dict(text_config(config))
        text["intermediate_size"] *= plan.factor
        config = {**config, "text_config": text} if "text_config" in config else text
    shards = split_into_shards(specs, MAX_SHARD_SIZE, "model")
    if len(shards) == 1:
        shards = {SINGLE_NAME: specs}
    request = {"source": source.identity, "format": "stock", "uniform": uniform}
    with OutputFolder(out, request) as folder:
        folder.write_shards(shards, progress)
        for file in side_files(checkpoint.path):
            folder.copy(file)
        total = sum(spec.nbytes for spec in specs)
        if len(shards) > 1:
            folder.write_index({spec.name: name for name, shard in shards.items() for spec in shard}, total)
        folder.write_json("config.json", config)
    return total


def _same(source: Source, name: str) -> TensorSpec:
    info = source.checkpoint.tensors[name]
    return TensorSpec(name, info.dtype, info.shape, lambda: [source.read(name)])


def _merged(source: Source, plan: GrowthPlan, uniform: bool) -> list[TensorSpec]:
    prefixes = mlp_prefixes(name for name in source.checkpoint.tensors if ".mlp.grown." not in name)
    others = sorted(set(prefixes) - set(plan.layers))
    if others and not uniform:
        raise UserError(
            f"layers {others} are not grown, and stock models have one width: add --uniform to pad them with zeros"
        )
    grown = {f"{prefixes[layer]}.": layer in plan.layers for layer in prefixes}
    specs = []
    for name, info in source.checkpoint.tensors.items():
        prefix, _, last = name.rpartition(".mlp.")
        mlp = f"{prefix}.mlp."
        if ".mlp.grown." in name:
            continue
        if mlp not in grown or not last.endswith("_proj.weight"):
            specs.append(_same(source, name))
            continue
        rows, columns = info.shape
        down = last.startswith("down_proj")
        shape = (rows, columns * plan.factor) if down else (rows * plan.factor, columns)
        added = f"{mlp}grown.{last}" if grown[mlp] else None
        specs.append(TensorSpec(name, info.dtype, shape, _joined(source, name, added, shape, down, plan.factor)))
    return specs


def _joined(
    source: Source, name: str, added: str | None, shape: tuple[int, ...], down: bool, k: int
) -> Callable[[], Iterable[Tensor]]:
    def pieces() -> Iterable[Tensor]:
        own = source.read(name)
        if added is None:
            rest = torch.zeros((shape[0], shape[1] - own.shape[1]) if down else (shape[0] - own.shape[0], shape[1]))
            copies = rest.to(own.dtype)
        else:
            copies = source.read(added)
            own = own / k if down else own
        return [torch.cat([own, copies], dim=1)] if down else [own, copies]

    return pieces


def _write_grown(source: Source, out: str, progress: Progress) -> int:
    """The base's shards linked as they are, and the growth as trained."""
    checkpoint = source.checkpoint
    growth_names = [name for name in checkpoint.tensors if ".mlp.grown." in name]
    shards = split_into_shards([_same(source, name) for name in growth_names], MAX_SHARD_SIZE, "growth")
    with OutputFolder(out, {"source": source.identity, "format": "grown"}) as folder:
        for shard in checkpoint.shards:
            if not shard.name.startswith("growth-"):
                folder.link(shard, grown_name(shard))
        checksums = folder.write_shards(shards, progress)
        for file in side_files(checkpoint.path):
            folder.copy(file)
        index = json.loads((checkpoint.path / INDEX_NAME).read_text())
        weight_map = index["weight_map"] | {spec.name: name for name, specs in shards.items() for spec in specs}
        folder.write_index(weight_map, index["metadata"]["total_size"])
        growth = checkpoint.config["growth"] | {"trained": source.facts, "tensors": checksums}
        folder.write_json("config.json", checkpoint.config | {"growth": growth})
    return sum(checkpoint.tensors[name].nbytes for name in growth_names)
