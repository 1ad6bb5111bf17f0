"""Base checkpoint → grown checkpoint, offline.

The base's shards are linked, not copied; only the added copies are computed and written, one tensor at a time.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.output import OutputFolder, Progress, no_progress, side_files
from grow.checkpoint.shards import SINGLE_NAME, Checkpoint, TensorSpec, file_checksum, split_into_shards
from grow.errors import UserError
from grow.plan import FORMAT_VERSION, GrowthPlan, mlp_prefixes, parse_factor, parse_layers

MAX_SHARD_SIZE = 5 * 10**9
# Where there is more than one added copy, they start this far apart (in standard deviations of the down-projection).
PERTURBATION = 0.01


def make_plan(base: Checkpoint, factor: int | str = 2, layers: str = "all") -> tuple[GrowthPlan, dict[int, str]]:
    """The plan for a base, and the key prefix of each layer's MLP. Raises UserError if the base cannot be grown."""
    if "growth" in base.config:
        raise UserError(f"{base.path}: is grown already; give the base it grew from")
    if "quantization_config" in base.config:
        raise UserError(f"{base.path}: its weights are quantized; give the checkpoint in bf16, fp16 or fp32")
    prefixes = mlp_prefixes(base.tensors)
    return GrowthPlan(parse_factor(factor), parse_layers(layers, max(prefixes) + 1)), prefixes


def added_tensors(base: Checkpoint, plan: GrowthPlan, prefixes: dict[int, str]) -> list[TensorSpec]:
    """The copies that growth adds, named `<mlp>.grown.{gate,up,down}_proj.weight`, in the base's dtype.

    gate and up: [(k−1)·p, h], copies one below the other. down: [h, (k−1)·p], copies side by side, each divided by k.
    """
    k = plan.factor
    specs = []
    for layer in plan.layers:
        if layer not in prefixes:
            raise UserError(f"layer {layer} has no gated MLP to grow; layers that have one: {sorted(prefixes)}")
        prefix = prefixes[layer]
        for name in ("gate_proj", "up_proj"):
            key = f"{prefix}.{name}.weight"
            p, h = base.tensors[key].shape
            pieces = _repeated(base, key, k - 1)
            specs.append(TensorSpec(f"{prefix}.grown.{name}.weight", base.tensors[key].dtype, ((k - 1) * p, h), pieces))
        key = f"{prefix}.down_proj.weight"
        h, p = base.tensors[key].shape
        pieces = _divided(base, key, k)
        specs.append(TensorSpec(f"{prefix}.grown.down_proj.weight", base.tensors[key].dtype, (h, (k - 1) * p), pieces))
    return specs


def _repeated(base: Checkpoint, key: str, times: int) -> Callable[[], Iterable[Tensor]]:
    return lambda: [base.read(key)] * times


def _divided(base: Checkpoint, key: str, k: int) -> Callable[[], Iterable[Tensor]]:
    if k == 2:
        return lambda: [base.read(key) / 2]
    return lambda: [_perturbed(base.read(key) / k, k - 1, key)]


def _perturbed(down: Tensor, copies: int, key: str) -> Tensor:
    """Several equal copies would get equal gradients and never part; offsets that sum to zero tell them apart."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    noise = torch.randn((copies, *down.shape), generator=generator)
    noise = (noise - noise.mean(dim=0)) * (PERTURBATION * down.float().std())
    return torch.cat([(down.float() + offset).to(down.dtype) for offset in noise], dim=1)


def grown_name(shard: Path) -> str:
    """The name of a base's shard in a grown checkpoint: transformers prefers a file called model.safetensors to the
    index beside it and would initialise the growth at random, so that name is never used."""
    return "model-00001-of-00001.safetensors" if shard.name == SINGLE_NAME else shard.name


def expand(
    base_path: str, out: str, factor: int | str = 2, layers: str = "all", progress: Progress = no_progress
) -> dict[str, Any]:
    """Writes the grown checkpoint OUT from BASE. Returns what was done, for people and for --json.

    Raises UserError for a base that cannot be grown or an OUT that exists.
    """
    base = Checkpoint(base_path)
    plan, prefixes = make_plan(base, factor, layers)
    specs = added_tensors(base, plan, prefixes)
    shards = split_into_shards(specs, MAX_SHARD_SIZE, "growth")
    request = {"base": base.identity(), "factor": plan.factor, "layers": plan.layers}
    with OutputFolder(out, request) as folder, ThreadPoolExecutor(1) as hasher:
        base_checksums = hasher.map(file_checksum, base.shards)
        for shard in base.shards:
            folder.link(shard, grown_name(shard))
        checksums = folder.write_shards(shards, progress)
        for file in side_files(base.path):
            folder.copy(file)
        weight_map = {name: grown_name(info.file) for name, info in base.tensors.items()}
        weight_map |= {spec.name: name for name, shard_specs in shards.items() for spec in shard_specs}
        folder.write_index(weight_map, sum(i.nbytes for i in base.tensors.values()) + sum(s.nbytes for s in specs))
        growth = {
            "format_version": FORMAT_VERSION,
            "factor": plan.factor,
            "layers": list(plan.layers),
            "trained": None,
            "base": {
                "files": {
                    grown_name(shard): {"name": shard.name, "bytes": shard.stat().st_size, "sha256": sha256}
                    for shard, sha256 in zip(base.shards, base_checksums, strict=True)
                }
            },
            "tensors": checksums,
        }
        folder.write_json("config.json", {**base.config, "growth": growth})
    return describe(base, plan, specs) | {"out": str(out)}


def describe(base: Checkpoint, plan: GrowthPlan, specs: list[TensorSpec]) -> dict[str, Any]:
    """What a plan comes to: layers, parameters (of the base, added = trained by g_freeze), bytes on disk."""
    parameters = sum(info.nbytes // info.dtype.itemsize for info in base.tensors.values())
    added = sum(spec.nbytes // spec.dtype.itemsize for spec in specs)
    return {
        "base": str(base.path),
        "factor": plan.factor,
        "layers": list(plan.layers),
        "base_parameters": parameters,
        "added_parameters": added,
        "trained_parameters": {"g_freeze": added},
        "base_bytes": sum(info.nbytes for info in base.tensors.values()),
        "added_bytes": sum(spec.nbytes for spec in specs),
    }
