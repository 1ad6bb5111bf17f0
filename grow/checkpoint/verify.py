"""Verification: whether a checkpoint is intact, and whether it is what its plan says."""

from pathlib import Path
from typing import Any

from grow.checkpoint.copies import expected_growth
from grow.checkpoint.hub import locate
from grow.checkpoint.lazy import sound
from grow.checkpoint.metadata import GROWTH_NAME, changed_files, read_growth
from grow.checkpoint.one_skill import OneSkill, facts_of, has_skills
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.writer import checksum, equal, file_checksums, header
from grow.errors import UserError
from grow.names import is_growth, skill_of
from grow.plan import GrowthPlan


def verify(path: str, base_path: str | None = None) -> dict[str, Any]:
    """Checks a grown checkpoint, or a stock one. Returns {"tensors": number checked, "problems": [a line each], …}.

    Grown: every tensor, every file of the base and every small file except README.md has the checksum that it was
    written with; the added tensors are those of the plan, in shape and dtype, and no others; before training, the
    copies equal the base, unless they came from elsewhere. With `base_path`: every tensor of the base is in the
    checkpoint, bit for bit. Stock: every tensor is readable and finite.

    Raises UserError if the checkpoint cannot be read at all.
    """
    if (locate(path) / GROWTH_NAME).exists():
        problems = changed_files(locate(path))
        if problems:  # then nothing that stands in them can be relied on
            return {"checkpoint": path, "grown": True, "tensors": 0, "problems": problems, "exact": False}
    checkpoint = Checkpoint(path)
    skills = checkpoint.config["growth"]["skills"] if has_skills(checkpoint.config) else {}
    plan = None if skills else GrowthPlan.from_config(checkpoint.config)
    problems = [
        f"{name} in {info.file.name}: holds values that are not finite"
        for name, info in checkpoint.tensors.items()
        for tensor in [checkpoint.lazy(name)]
        if not all(sound(tensor, block) for block in tensor.blocks())
    ]
    if plan is not None:
        facts = read_growth(checkpoint.path)
        problems += _base_files(checkpoint, facts) + _growth(checkpoint, plan, facts)
    if skills:
        problems += _base_files(checkpoint, read_growth(checkpoint.path)) + _skills(checkpoint, list(skills))
    grown, elsewhere = plan is not None or bool(skills), (checkpoint.config.get("growth") or {}).get("copies_from")
    problems += _headers(checkpoint) if grown else []
    if base_path is not None:
        problems += _same_base(checkpoint, Checkpoint(base_path), grown)
    return {
        "checkpoint": path,
        "grown": grown,
        "tensors": len(checkpoint.tensors),
        "problems": problems,
        # Whether the grown model's logits must be the base's bit for bit before training.
        "exact": plan is None
        or (plan.factor == 2 and all(info.dtype != "F16" for info in checkpoint.tensors.values())),
        "trained": grown and (bool(skills) or read_growth(checkpoint.path)["trained"] is not None),
        **({"copies_from": elsewhere, "factor": plan.factor} if elsewhere and plan else {}),
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
        if whole != expected["xxh3_128"] and not changed:
            problems.append(f"{name}: not the base's file any more (checksum; its header changed)")
    return problems


def _growth(checkpoint: Checkpoint, plan: GrowthPlan, facts: dict[str, Any]) -> list[str]:
    expected, wrong = expected_growth(checkpoint, plan)
    problems = list(wrong.values())
    for name in [name for name in expected if name not in wrong]:
        info = checkpoint.tensors[name]
        if checksum(checkpoint.lazy(name)) != facts["tensors"].get(name):
            problems.append(f"{name} in {info.file.name}: changed since it was written (checksum)")
        elif (
            facts["trained"] is None and "copies_from" not in facts and not equal(checkpoint.lazy(name), expected[name])
        ):
            problems.append(f"{name}: is not the copy of the base that it should be before training")
    return problems


def _headers(checkpoint: Checkpoint) -> list[str]:
    return [
        f"{shard.name}: its header changed since it was written"
        for shard in checkpoint.shards
        if shard.name.startswith("growth-") and not _as_written(checkpoint, shard)
    ]


def _skills(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Returns a line for each tensor of a skill that is not as it should be, or is of no skill."""
    problems = []
    for name in names:
        one = OneSkill(checkpoint, name)
        plan = GrowthPlan.from_config(one.config)
        assert plan is not None
        problems += [f"{name}: {line}" for line in _growth(one, plan, facts_of(checkpoint.path, name))]
    strange = [key for key in checkpoint.tensors if is_growth(key) and skill_of(key) not in names]
    return problems + [f"{key}: is of no skill" for key in strange]


def _as_written(checkpoint: Checkpoint, shard: Path) -> bool:
    """Says whether a header is, byte for byte, the one that would be written for the tensors it names."""
    written = header({name: info for name, info in checkpoint.tensors.items() if info.file == shard})
    with shard.open("rb") as file:
        return file.read(len(written)) == written


def _same_base(checkpoint: Checkpoint, base: Checkpoint, grown: bool) -> list[str]:
    """Returns a line for each tensor of the base that is not in the checkpoint bit for bit, and for each tensor of a
    grown checkpoint that is neither the base's nor growth."""
    if Path(checkpoint.path).resolve() == base.path.resolve():
        raise UserError(f"--base {base.path}: is the checkpoint itself")
    problems = []
    for name, info in base.tensors.items():
        mine = checkpoint.tensors.get(name)
        if mine is None:
            problems.append(f"{name}: is in the base but not in the checkpoint")
        elif (mine.shape, mine.dtype) != (info.shape, info.dtype):
            problems.append(f"{name}: is {list(mine.shape)} {mine.dtype}, in the base {list(info.shape)} {info.dtype}")
        elif not equal(checkpoint.lazy(name), base.lazy(name)):
            problems.append(f"{name} in {mine.file.name}: differs from the base's")
    if grown:
        extra = set(checkpoint.tensors) - set(base.tensors)
        problems += [f"{name}: is neither the base's nor growth" for name in sorted(extra) if not is_growth(name)]
    return problems
