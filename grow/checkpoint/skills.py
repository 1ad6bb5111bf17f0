"""Several skills on one base: a grown checkpoint with format version 2.

    config.json     "growth": {"format_version": 2, "base": …, "skills": {NAME: the growth of one skill, "alpha": …}}
    growth-*        …mlp.grown.NAME.gate_proj.weight and so on

What is known of a skill is what stands in its package; each can be taken out as it went in.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from grow.checkpoint.expand import grown_name, link_base
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.metadata import without_checksums, write_metadata
from grow.checkpoint.output import OutputFolder, no_progress, refuse_existing
from grow.checkpoint.package import added_as_of, check_same_base, open_package
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, files_of, parse_size, split_into_shards
from grow.errors import UserError
from grow.names import MATRICES, of_skill
from grow.parts import parts_of
from grow.plan import SKILLS_VERSION, GrowthPlan

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def named_packages(words: list[str]) -> dict[str, str]:
    """Returns packages by the names of their skills: "name=folder", or a folder, whose last part is the name.

    Raises UserError for names that are no names, or that stand twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals:
            name, folder = word.rstrip("/").rpartition("/")[2], word
        if not _NAME.fullmatch(name) or name in MATRICES:
            raise UserError(f"attach: {name!r} is no name of a skill (letters, digits, - and _): write NAME={folder}")
        if name in found:
            raise UserError(f"attach: two skills are called {name}: write NAME={folder}")
        found[name] = folder
    return found


def parse_alphas(text: str) -> dict[str, float]:
    """Reads "french=1,entailment=0.5". Raises UserError for anything else."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--alpha {text}: write NAME=ALPHA with commas, such as french=1,entailment=0.5") from None
    return found


def attach_skills(base_path: str, packages: Mapping[str, str], out: str, alphas: Mapping[str, float]) -> dict[str, Any]:
    """Writes OUT, a grown checkpoint: the base with several growth packages, by the names of their skills.

    `alphas` has the interpolation coefficients of those that are not 1. Raises UserError for a package that grew from
    another base, or for an α of no skill.
    """
    refuse_existing(Path(out))
    for name, alpha in alphas.items():
        if name not in packages:
            raise UserError(f"--alpha {name}: there is no such skill; there are {', '.join(packages)}")
        if not 0 <= alpha <= 1:
            raise UserError(f"--alpha {name}={alpha:g}: it lies between 0 (the base) and 1 (as trained)")
    own = Checkpoint(base_path)
    if "growth" in own.config:
        raise UserError(f"{base_path}: is grown already; give its base (grow base {quote(base_path)} OUT)")
    made: dict[str, LazyTensor] = {}
    known: dict[str, Any] = {}
    sums_of: dict[str, Any] = {}
    skills, identities = {}, []
    for name, package in packages.items():
        facts, added = open_package(package)
        twice = next((other for other, known_sums in sums_of.items() if known_sums == facts["tensors"]), None)
        if twice is not None:
            raise UserError(f"attach: {name} and {twice} are the same growth; attach it once")
        plan = GrowthPlan.from_config({"growth": facts})
        assert plan is not None
        for part, where in parts_of(plan):
            if part.must_be_alone(where):
                raise UserError(f"attach: {package}: {part.must_be_alone(where)}; attach it alone")
        sums_of[name] = facts["tensors"]
        known |= {key: facts[key] for key in ("base", "base_tensors")} | check_same_base(own, facts)
        made |= {of_skill(key, name): tensor for key, tensor in added_as_of(own, added).items()}
        skills[name] = {k: v for k, v in without_checksums(facts).items() if k not in ("base", "format_version")}
        skills[name]["alpha"] = alphas.get(name, 1.0)
        identities.append([str(shard.resolve()) for shard in added.shards])
    shards = split_into_shards(made, parse_size("--max-shard-size", GROWTH_SHARD_SIZE), "growth")
    with OutputFolder(out, {"skills": [own.identity(), identities, skills]}) as folder:
        link_base(folder, own)
        sums = folder.write_shards(shards, no_progress)
        weight_map = files_of(shards) | {name: grown_name(info.file) for name, info in own.tensors.items()}
        sizes = {name: tensor.nbytes for name, tensor in made.items()}
        folder.write_index(weight_map, sizes | {name: info.nbytes for name, info in own.tensors.items()})
        growth = {"format_version": SKILLS_VERSION, "base": known["base"], "skills": skills}
        write_metadata(folder, growth | {"tensors": sums, "base_tensors": known["base_tensors"]}, own.config)
    return {"base": base_path, "skills": dict(packages), "out": out}
