"""Expansion: a base checkpoint becomes a grown checkpoint, offline.

The base's shards are linked, not copied; only the added copies are computed and written, a block of rows at a time.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from grow.checkpoint.card import base_facts
from grow.checkpoint.dtypes import Rows, convert, itemsize
from grow.checkpoint.growable import (
    PARTS,
    check_copies,
    check_projector,
    checked_attention,
    checked_mlp_prefixes,
    checked_tower,
    is_transposed,
    layout_of,
    projection_of,
)  # fmt: skip
from grow.checkpoint.lazy import LazyTensor, concat_columns, concat_rows
from grow.checkpoint.metadata import BASE_FOLDER, write_metadata
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Checkpoint, has_index
from grow.checkpoint.starting import check_not_quantized, check_start
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, file_checksums, files_of, parse_size, split_into_shards
from grow.errors import UserError
from grow.names import (
    ATTENTION,
    FUSED,
    PROJECTOR,
    attention_prefix,
    canonical,
    is_down,
    is_growth,
    named_beside,
    tower_prefixes,
)
from grow.plan import Growth, GrowthPlan, growing_layers, grows_beside, parse_factor

# Several added copies start this far apart, in standard deviations of a row of the down-projection.
PERTURBATION = 0.01


def make_plan(base: Checkpoint, **growth: Any) -> tuple[GrowthPlan, dict[int, str]]:
    """Returns the plan for a base, and the key prefix of each layer's MLP; `growth` are fields of grow.plan.Growth.
    Raises UserError if the base cannot be grown."""
    if "growth" in base.config or any(is_growth(name) for name in base.tensors):
        raise UserError(f"{base.path}: is grown already; give the base it grew from")
    check_not_quantized(base)
    prefixes = checked_mlp_prefixes(base)
    for shard in base.shards:
        if shard.name.startswith("growth-"):
            raise UserError(f"{shard}: a grown checkpoint needs that name for another file; rename the shard")
    return plan_of(base, prefixes, Growth(**growth)), prefixes


def plan_of(base: Checkpoint, prefixes: dict[int, str], growth: Growth) -> GrowthPlan:
    """Returns the plan for a base, or for one that is inside a grown checkpoint, as make_plan does; `prefixes` are
    those of its MLPs."""
    plan = GrowthPlan(parse_factor(growth.factor), ())
    if growth.attention_layers and not growth.attention:
        raise UserError("--attention-layers: says where, with --attention queries or heads")
    if growth.tower_layers and not growth.tower:
        raise UserError("--tower-layers: says where, with --tower vision")
    if growth.attention:
        chosen = checked_attention(base, plan, prefixes, growth.attention, growth.attention_layers or "all")
        plan = dataclasses.replace(plan, attention=chosen, attention_kind=growth.attention)
    if growth.tower:
        plan = dataclasses.replace(plan, tower=checked_tower(base, growth.tower, growth.tower_layers or "all"))
    if growth.train_projector:
        check_projector(base)
        plan = dataclasses.replace(plan, projector=True)
    if growth.mlps != "none" or not grows_beside(vars(growth)):
        plan = dataclasses.replace(plan, layers=growing_layers(growth.mlps, len(prefixes), base.config))
    return plan


def check_grown(base: str, out: str, copies_from: str = "", **growth: Any) -> dict[str, Any]:
    """Describes the checkpoint OUT. Raises UserError if it has not grown as `growth` (fields of grow.plan.Growth) says
    from this base, or from other copies."""
    wanted, _ = make_plan(Checkpoint(base), **growth)
    there = GrowthPlan.from_config(Checkpoint(out).config)
    if there is None or there.as_expanded() != wanted:
        heads, tower = (", ".join(map(str, layers)) for layers in (wanted.attention, wanted.tower))
        asked = f"layers {', '.join(map(str, wanted.layers)) or 'none'} by {wanted.factor}"
        asked += f", and the {wanted.attention_kind} of layers {heads}" * bool(heads)
        asked += f", and layers {tower} of the tower" * bool(tower) + ", and the projector" * wanted.projector
        raise UserError(f"{out}: is there already, and has not grown in {asked}; give another folder, or remove it")
    from_there = Checkpoint(out).config["growth"].get("copies_from", "")
    wanted_from = base_facts(Checkpoint(copies_from))["name"] if copies_from else ""
    if from_there != wanted_from:
        said = f"copies from {from_there or 'its base'}, not from {wanted_from or 'its base'}"
        raise UserError(f"{out}: is there already, with {said}; give another folder, or remove it")
    return {"out": out, "base": base, "factor": wanted.factor, "layers": list(wanted.layers)}


def added_tensors(
    base: Checkpoint, plan: GrowthPlan, prefixes: dict[int, str], copies: Checkpoint | None = None
) -> dict[str, LazyTensor]:
    """Returns the copies that growth adds, named `<mlp>.grown.{gate,up,down}_proj.weight` (or as the base's layout has
    it; in gate_up_proj copies of gate stand above those of up), in the base's dtype.

    gate and up: [(k−1)·p, h], copies concatenated by rows. down: [h, (k−1)·p], copies concatenated by columns, each
    divided by k; in a GPT-2 all of them transposed. Heads of attention likewise, o_proj as down. Biases, where the base
    has them: [(k−1)·p] copied; the down-projection's [h] once, times (k−1)/k. With `copies` they are of that
    checkpoint's MLPs in place of the base's.
    """
    k = plan.factor
    others = {canonical(name): name for name in copies.tensors} if copies else {}
    transposed = is_transposed(base.config)
    added = {}
    for layer in (*plan.layers, *plan.attention):
        if layer not in prefixes:
            raise UserError(f"layer {layer} has no MLP to grow; layers that have one: {sorted(prefixes)}")
    parts = {prefixes[layer]: layout_of(base, prefixes[layer]) for layer in plan.layers}
    parts |= {attention_prefix(prefixes[layer]): ATTENTION[plan.attention_kind] for layer in plan.attention}
    parts |= {prefix: layout_of(base, prefix) for prefix in grown_in_tower(base, plan)}
    for prefix, layout in parts.items():
        for projection in layout:
            for part in PARTS:
                name = f"{prefix}.{projection}.{part}"
                if name not in base.tensors:
                    continue
                own = base.lazy(name)
                if copies is not None:
                    own = copies.lazy(others[canonical(name)]).to(own.dtype)
                if projection == FUSED:
                    gate, up = own.halves()
                    made = concat_rows(*[gate] * (k - 1), *[up] * (k - 1))
                elif not is_down(name):
                    made = (concat_columns if transposed and part == "weight" else concat_rows)(*[own] * (k - 1))
                elif part == "bias":
                    made = own.scaled((k - 1) / k)
                else:
                    made = _divided(own, k, name, transposed)
                added[f"{prefix}.grown.{projection}.{part}"] = made
    matrix = projection_of(base) if plan.projector else None
    if matrix is not None:  # linear: one copy, half and half, does for any k, and is exact
        added[named_beside(f"{PROJECTOR}.grown.", matrix)] = base.lazy(matrix).scaled(0.5)
    return added


def grown_in_tower(base: Checkpoint, plan: GrowthPlan) -> list[str]:
    """Returns the key prefixes of a tower's MLPs that a plan grows. Raises UserError where there are none such."""
    there = tower_prefixes(base.tensors) if plan.tower else {}
    missing = [layer for layer in plan.tower if layer not in there]
    if missing:
        raise UserError(f"{base.path}: layers {missing} of its tower have no MLP to grow; those of {list(there)} have")
    return [there[layer] for layer in plan.tower]


def expected_growth(grown: Checkpoint, plan: GrowthPlan) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Returns the growth that a plan asks for, as it was before training, computed from the base inside; and problems
    by name: a line for each tensor that is missing, superfluous, or of another shape or dtype."""
    expected = added_tensors(grown, plan, checked_mlp_prefixes(grown))
    if plan.trained_up:
        expected |= {
            name.replace(".grown.", ".trained."): grown.lazy(name.replace(".grown.", "."))
            for name in list(expected)
            if not is_down(name)
        }
    extra = (name for name in grown.tensors if is_growth(name) and name not in expected)
    problems = {name: f"{name}: is not in the plan" for name in extra}
    for name, tensor in expected.items():
        info = grown.tensors.get(name)
        if info is None:
            problems[name] = f"{name}: is in the plan but not in the checkpoint"
        elif (info.shape, info.dtype) != (tensor.shape, tensor.dtype):
            wanted = f"{list(tensor.shape)} {tensor.dtype}"
            problems[name] = f"{name}: is {list(info.shape)} {info.dtype}, the plan says {wanted}"
    return expected, problems


def _divided(down: LazyTensor, k: int, name: str, transposed: bool) -> LazyTensor:
    """Maps [h, p] to [h, (k−1)·p], each copy divided by k; or, transposed, [p, h] to [(k−1)·p, h].

    Several equal copies would get equal gradients and stay equal for ever. So they start apart by noise that sums to
    zero: the last copy is (k−1)/k·D minus the other copies, so that the sum is off by one rounding only.
    """
    if k == 2:
        return down.scaled(0.5)
    length, columns = down.shape

    def copies_of(index: int, values: Rows) -> Rows:
        seed = int.from_bytes(hashlib.sha256(f"{name} {index}".encode()).digest()[:8], "big")
        noise = np.random.default_rng(seed).standard_normal((k - 1, columns), dtype=np.float32)
        noise = (noise - noise.mean(axis=0)) * (PERTURBATION * values.std())
        copies = convert(values / np.float32(k) + noise, "F32", down.dtype)
        others = convert(copies[:-1], down.dtype, "F32").sum(axis=0)
        copies[-1] = convert(values * np.float32((k - 1) / k) - others, "F32", down.dtype)
        return copies

    def own_rows(begin: int, end: int) -> Rows:
        return convert(down.rows(begin, end), down.dtype, "F32")

    def side_by_side(begin: int, end: int) -> Rows:
        return np.stack([copies_of(begin + i, own).reshape(-1) for i, own in enumerate(own_rows(begin, end))])

    def below_each_other(begin: int, end: int) -> Rows:
        places = (divmod(row, length) for row in range(begin, end))
        return np.stack([copies_of(row, own_rows(row, row + 1)[0])[copy] for copy, row in places])

    if transposed:
        return LazyTensor(((k - 1) * length, columns), down.dtype, below_each_other)
    return LazyTensor((length, (k - 1) * columns), down.dtype, side_by_side)


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
    """Writes the grown checkpoint OUT from BASE; `growth` are fields of grow.plan.Growth. Returns what was done, for
    people and for --json.

    The copies are of the base's MLPs; or of those of another checkpoint, `copies_from`: then the start is the mean of
    the two (for k = 2), and the base exactly at α = 0 alone (Deep Fusion, arXiv 2306.11903, as an initialisation).

    Raises UserError for a base that cannot be grown or an OUT that exists.
    """
    refuse_existing(Path(out))
    base = Checkpoint(base_path)
    plan, prefixes = make_plan(base, **growth)
    check_start(base)
    copies = Checkpoint(copies_from) if copies_from else None
    if copies is not None and (plan.attention or plan.tower or plan.projector):
        raise UserError("--copies-from: copies MLPs of the language model; leave --attention and --tower out")
    if copies is not None:
        check_copies(base, copies, plan, prefixes)
    added = added_tensors(base, plan, prefixes, copies)
    shards = split_into_shards(added, parse_size("--max-shard-size", max_shard_size), "growth")
    request = {"base": base.identity(), "factor": plan.factor, "layers": plan.layers, "shards": list(shards)}
    request |= {"attention": [plan.attention_kind, plan.attention]} if plan.attention else {}
    request |= {"tower": [plan.tower, plan.projector]} if plan.tower or plan.projector else {}
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
        **({"attention": plan.attention_kind, "attention_layers": list(plan.attention)} if plan.attention else {}),
        **({"tower_layers": list(plan.tower)} if plan.tower else {}),
        **({"projector": True} if plan.projector else {}),
        "base_parameters": sum(info.nbytes // itemsize(info.dtype) for info in base.tensors.values()),
        "added_parameters": count,
        "trained_parameters": {"g_freeze": count, "g_train": count + up},
        "base_bytes": sum(info.nbytes for info in base.tensors.values()),
        "added_bytes": sum(tensor.nbytes for tensor in added.values()),
    }
