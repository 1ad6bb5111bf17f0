"""Expansion: a base checkpoint becomes a grown checkpoint, offline.

The base's shards are linked, not copied; only the added copies are computed and written, a block of rows at a time.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grow.checkpoint.card import base_facts
from grow.checkpoint.copies import added_tensors
from grow.checkpoint.dtypes import itemsize
from grow.checkpoint.growable import check_copies, make_plan
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.metadata import BASE_FOLDER, write_metadata
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Checkpoint, has_index
from grow.checkpoint.starting import check_start
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, file_checksums, files_of, parse_size, split_into_shards
from grow.errors import UserError
from grow.names import is_down
from grow.parts import grown_words
from grow.plan import GrowthPlan


def check_grown(base: str, out: str, copies_from: str = "", **growth: Any) -> dict[str, Any]:
    """Describes the checkpoint OUT. Raises UserError if it has not grown as `growth` (grow.checkpoint.growable.plan_of)
    says from this base, or from other copies."""
    wanted = make_plan(Checkpoint(base), **growth)
    there = GrowthPlan.from_config(Checkpoint(out).config)
    if there is None or there.as_expanded() != wanted:
        raise UserError(
            f"{out}: is there already, and has not grown in {grown_words(wanted)}: give another folder, or remove it"
        )
    from_there = Checkpoint(out).config["growth"].get("copies_from", "")
    wanted_from = base_facts(Checkpoint(copies_from))["name"] if copies_from else ""
    if from_there != wanted_from:
        said = f"copies from {from_there or 'its base'}, not from {wanted_from or 'its base'}"
        raise UserError(f"{out}: is there already, with {said}; give another folder, or remove it")
    return {"out": out, "base": base, "factor": wanted.factor, "layers": list(wanted.layers)}


def grown_name(shard: Path) -> str:
    """Returns the name of a base's shard in a grown checkpoint. transformers prefers a file called model.safetensors to
    the index beside it and would initialise the growth at random, so that name is never used."""
    return "model-00001-of-00001.safetensors" if shard.name == SINGLE_NAME else shard.name


def expand(
    base_path: str,
    out: str,
    max_shard_size: str = GROWTH_SHARD_SIZE,
    progress: Progress = no_progress,
    copies_from: str = "",
    **growth: Any,
) -> dict[str, Any]:
    """Writes the grown checkpoint OUT from BASE; `growth` is as grow.checkpoint.growable.plan_of takes it. Returns what
    was done, for people and for --json.

    The copies are of the base's MLPs; or of those of another checkpoint, `copies_from`: then the start is the mean of
    the two (for k = 2), and the base exactly at α = 0 alone (Deep Fusion, arXiv 2306.11903, as an initialisation).

    Raises UserError for a base that cannot be grown or an OUT that exists.
    """
    refuse_existing(Path(out))
    base = Checkpoint(base_path)
    plan = make_plan(base, **growth)
    check_start(base)
    copies = Checkpoint(copies_from) if copies_from else None
    if copies is not None:
        check_copies(base, copies, plan)
    added = added_tensors(base, plan, copies)
    shards = split_into_shards(added, parse_size("--max-shard-size", max_shard_size), "growth")
    request = {"base": base.identity(), "factor": plan.factor, "layers": plan.layers, "shards": list(shards)}
    request |= {"parts": {name: asdict(where) for name, where in plan.beside.items()}} if plan.beside else {}
    request |= {"copies": copies.identity()} if copies is not None else {}
    with OutputFolder(out, request) as folder, ThreadPoolExecutor(1) as hasher:
        identity = hasher.submit(base_identity, base)
        link_base(folder, base)
        checksums = folder.write_shards(shards, progress)
        files, base_tensors = identity.result()
        facts = plan.facts() | {"trained": None, "base": {**base_facts(base), "files": files}}
        facts |= {"copies_from": base_facts(copies)["name"]} if copies is not None else {}
        weight_map = {name: grown_name(info.file) for name, info in base.tensors.items()}
        weight_map |= files_of(shards)
        sizes = {name: info.nbytes for name, info in base.tensors.items()} | {n: t.nbytes for n, t in added.items()}
        folder.write_index(weight_map, sizes)
        write_metadata(folder, facts | {"tensors": checksums, "base_tensors": base_tensors}, base.config)
    return describe_growth(base, plan, added) | {"out": str(out)}


def base_identity(base: Checkpoint) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what identifies a base: facts of its files, by the names that they have in a grown checkpoint, and the
    checksum of every tensor."""
    files: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    for shard in base.shards:
        whole, own = file_checksums(shard)
        files[grown_name(shard)] = {"name": shard.name, "bytes": shard.stat().st_size, "xxh3_128": whole}
        tensors |= own
    return files, tensors


def link_base(folder: OutputFolder, base: Checkpoint) -> None:
    """Puts a base's files into a grown checkpoint: shards are linked and small files copied. Those that a grown
    checkpoint replaces by its own are kept as they were in `base/`."""
    for shard in base.shards:
        folder.link(shard, grown_name(shard))
    for file in side_files(base.path):
        folder.copy(file)
    for name in ("config.json", *([INDEX_NAME] if has_index(base.path) else []), "README.md"):
        if (base.path / name).is_file():
            folder.copy(base.path / name, f"{BASE_FOLDER}/{name}")


def link_again(folder: OutputFolder, grown: Checkpoint, shards: Iterable[Path]) -> None:
    """Links some shards, and copies all small files, of a grown checkpoint into another one of the same base."""
    for shard in shards:
        folder.link(shard, shard.name)
    for file in side_files(grown.path):
        folder.copy(file)
    for file in sorted((grown.path / BASE_FOLDER).iterdir()):
        folder.copy(file, f"{BASE_FOLDER}/{file.name}")


def describe_growth(base: Checkpoint, plan: GrowthPlan, added: dict[str, LazyTensor]) -> dict[str, Any]:
    """Describes what a plan grows: layers, parameters (of the base, added, trained), bytes on disk."""
    count = sum(tensor.numel for tensor in added.values())
    up = sum(tensor.numel for name, tensor in added.items() if not is_down(name)) // (plan.factor - 1)
    return {
        "base": str(base.path),
        "factor": plan.factor,
        "layers": list(plan.layers),
        "parts": {name: asdict(where) for name, where in plan.beside.items()},
        "grown": grown_words(plan),
        "base_parameters": sum(info.nbytes // itemsize(info.dtype) for info in base.tensors.values()),
        "added_parameters": count,
        "trained_parameters": {"g_freeze": count, "g_train": count + up},
        "base_bytes": sum(info.nbytes for info in base.tensors.values()),
        "added_bytes": sum(tensor.nbytes for tensor in added.values()),
    }
