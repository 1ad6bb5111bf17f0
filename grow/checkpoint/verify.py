"""Is a checkpoint intact, and is it what its plan says?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.expand import added_tensors
from grow.checkpoint.lazy import Lazy
from grow.checkpoint.shards import Checkpoint, read_json
from grow.checkpoint.writer import checksum, file_checksums, finite
from grow.errors import UserError
from grow.plan import GrowthPlan, is_growth, mlp_prefixes


def verify(path: str, base_path: str | None = None) -> dict[str, Any]:
    """Checks a grown checkpoint, or a stock one. Returns {"tensors": number checked, "problems": [a line each], …}.

    Grown: every tensor has the checksum that it was written with, the base's own files too; every added tensor is
    there, in its shape and dtype, none besides; before training, the copies are copies. With `base_path`: every tensor
    of the base is in the checkpoint, bit for bit. Stock: every tensor is readable and finite.
    Raises UserError if the checkpoint cannot be read at all.
    """
    checkpoint = Checkpoint(path)
    plan = GrowthPlan.from_config(checkpoint.config)
    problems = [
        f"{name} in {info.file.name}: holds values that are not finite"
        for name, info in checkpoint.tensors.items()
        if not all(finite(block) for block in checkpoint.lazy(name).blocks())
    ]
    if plan is not None:
        facts = read_json(checkpoint.path / "growth.json")
        problems += _base_files(checkpoint, facts) + _growth(checkpoint, plan, facts)
    if base_path is not None:
        problems += _same_base(checkpoint, Checkpoint(base_path), plan is not None)
    return {
        "checkpoint": path,
        "grown": plan is not None,
        "tensors": len(checkpoint.tensors),
        "problems": problems,
        # Whether the grown model's logits must be the base's bit for bit before training.
        "exact": plan is None
        or (plan.factor == 2 and not any(i.dtype == torch.float16 for i in checkpoint.tensors.values())),
    }


def _base_files(checkpoint: Checkpoint, facts: dict[str, Any]) -> list[str]:
    problems = []
    for name, expected in facts["base"]["files"].items():
        file = checkpoint.path / name
        if not file.is_file():
            problems.append(f"{name}: the base's file is missing")
            continue
        whole, tensors = file_checksums(file)
        changed = [key for key, digest in tensors.items() if digest != facts["base_tensors"].get(key)]
        problems += [f"{key} in {name}: not the base's any more (checksum)" for key in changed]
        if whole != expected["sha256"] and not changed:
            problems.append(f"{name}: not the base's file any more (checksum; its header changed)")
    return problems


def _growth(checkpoint: Checkpoint, plan: GrowthPlan, facts: dict[str, Any]) -> list[str]:
    problems = []
    try:
        expected = added_tensors(checkpoint, plan, mlp_prefixes(checkpoint.tensors))
    except UserError as error:
        return [str(error)]
    if plan.trained_up:
        expected |= {
            name.replace(".grown.", ".trained."): checkpoint.lazy(name.replace(".grown.", "."))
            for name in list(expected)
            if ".down_proj." not in name
        }
    present = {name for name in checkpoint.tensors if is_growth(name)}
    problems += [f"{name}: is not in the plan" for name in sorted(present - set(expected))]
    for name, tensor in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name}: is in the plan but not in the checkpoint")
        elif (info.shape, info.dtype) != (tensor.shape, tensor.dtype):
            wanted = f"{list(tensor.shape)} {tensor.dtype}"
            problems.append(f"{name}: is {list(info.shape)} {info.dtype}, the plan says {wanted}")
        elif checksum(checkpoint.lazy(name)) != facts["tensors"].get(name):
            problems.append(f"{name} in {info.file.name}: changed since it was written (checksum)")
        elif facts["trained"] is None and not _equal(checkpoint.lazy(name), tensor):
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
        elif not _equal(checkpoint.lazy(name), base.lazy(name)):
            problems.append(f"{name} in {mine.file.name}: differs from the base's")
    if grown:
        extra = set(checkpoint.tensors) - set(base.tensors)
        problems += [f"{name}: is neither the base's nor growth" for name in sorted(extra) if not is_growth(name)]
    return problems


def _equal(one: Lazy, other: Lazy) -> bool:
    """Bit for bit; NaNs too."""
    return all(torch.equal(_bits(a), _bits(b)) for a, b in _pairs(one, other))


def _pairs(one: Lazy, other: Lazy) -> Iterator[tuple[Tensor, Tensor]]:
    begin = 0
    for block in one.blocks():
        yield block, other.rows(begin, begin + len(block))
        begin += len(block)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
