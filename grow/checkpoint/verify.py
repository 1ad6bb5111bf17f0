"""Is a checkpoint intact, and is it what its plan says?"""

from pathlib import Path
from typing import Any

import torch

from grow.checkpoint.expand import added_tensors
from grow.checkpoint.shards import Checkpoint, checksum, file_checksum
from grow.errors import UserError
from grow.plan import GrowthPlan, mlp_prefixes


def verify(path: str, base_path: str | None = None) -> dict[str, Any]:
    """Checks a grown checkpoint, or a stock one. Returns {"tensors": number checked, "problems": [a line each]}.

    Grown: the base's files are those that were grown, by checksum; every added tensor is there, in its shape and dtype
    and with its checksum, none besides; before training, the copies are copies. With `base_path`: every tensor of the
    base is in the checkpoint, bit for bit. Stock: every tensor is readable and finite.
    Raises UserError if the checkpoint cannot be read at all.
    """
    checkpoint = Checkpoint(path)
    plan = GrowthPlan.from_config(checkpoint.config)
    problems = _finite(checkpoint)
    if plan is not None:
        problems += _files(checkpoint) + _growth(checkpoint, plan)
    if base_path is not None:
        problems += _same_base(checkpoint, Checkpoint(base_path), plan is not None)
    return {"checkpoint": path, "grown": plan is not None, "tensors": len(checkpoint.tensors), "problems": problems}


def _finite(checkpoint: Checkpoint) -> list[str]:
    return [
        f"{name} in {info.file.name}: holds values that are not finite"
        for name, info in checkpoint.tensors.items()
        if info.dtype.is_floating_point and not torch.isfinite(checkpoint.read(name)).all()
    ]


def _files(checkpoint: Checkpoint) -> list[str]:
    problems = []
    for name, facts in checkpoint.config["growth"]["base"]["files"].items():
        file = checkpoint.path / name
        if not file.is_file():
            problems.append(f"{name}: the base's file is missing")
        elif file_checksum(file) != facts["sha256"]:
            problems.append(f"{name}: not the base's file any more (checksum)")
    return problems


def _growth(checkpoint: Checkpoint, plan: GrowthPlan) -> list[str]:
    problems = []
    growth = checkpoint.config["growth"]
    prefixes = mlp_prefixes(name for name in checkpoint.tensors if ".mlp.grown." not in name)
    try:
        expected = {spec.name: spec for spec in added_tensors(checkpoint, plan, prefixes)}
    except UserError as error:
        return [str(error)]
    present = {name for name in checkpoint.tensors if ".mlp.grown." in name}
    problems += [f"{name}: is not in the plan" for name in sorted(present - set(expected))]
    for name, spec in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name}: is in the plan but not in the checkpoint")
        elif (info.shape, info.dtype) != (spec.shape, spec.dtype):
            problems.append(
                f"{name}: is {list(info.shape)} {info.dtype}, the plan says {list(spec.shape)} {spec.dtype}"
            )
        elif checksum(checkpoint.read(name)) != growth["tensors"].get(name):
            problems.append(f"{name} in {info.file.name}: changed since it was written (checksum)")
        elif growth["trained"] is None and not torch.equal(checkpoint.read(name), torch.cat(list(spec.pieces()))):
            problems.append(f"{name}: is not the copy of the base that it should be before training")
    return problems


def _same_base(checkpoint: Checkpoint, base: Checkpoint, grown: bool) -> list[str]:
    """Stock checkpoints are compared where names and shapes agree: SFT changes values, consolidation shapes."""
    if Path(checkpoint.path).resolve() == base.path.resolve():
        raise UserError(f"--base {base.path}: is the checkpoint itself")
    problems = []
    for name, info in base.tensors.items():
        mine = checkpoint.tensors.get(name)
        if mine is None:
            problems.append(f"{name}: is in the base but not in the checkpoint")
        elif (mine.shape, mine.dtype) != (info.shape, info.dtype):
            problems.append(f"{name}: is {list(mine.shape)} {mine.dtype}, in the base {list(info.shape)} {info.dtype}")
        elif not _bits_equal(checkpoint.read(name), base.read(name)):
            problems.append(f"{name} in {mine.file.name}: differs from the base's")
    if grown:
        extra = set(checkpoint.tensors) - set(base.tensors)
        problems += [f"{name}: is neither the base's nor growth" for name in sorted(extra) if ".mlp.grown." not in name]
    return problems


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
