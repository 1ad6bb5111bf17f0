"""One of several skills, seen as a grown checkpoint that has it alone (grow.checkpoint.skills)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grow.checkpoint.metadata import read_growth
from grow.checkpoint.shards import Checkpoint, read_json
from grow.errors import UserError
from grow.names import is_growth, of_skill, skill_of
from grow.plan import SKILLS_VERSION, GrowthPlan, growth_of_skill, skill_plans


def has_skills_at(path: str) -> bool:
    """Says whether a folder is a checkpoint with several skills."""
    config = Path(path) / "config.json"
    return config.is_file() and has_skills(read_json(config))


def plans_of(config: Mapping[str, Any]) -> dict[str, GrowthPlan]:
    """Returns the growth plans of a checkpoint by skill, each with its α; a single one has the name "". {}
    if the checkpoint is not grown."""
    if not has_skills(config):
        plan = GrowthPlan.from_config(dict(config))
        return {} if plan is None else {"": plan}
    return skill_plans(config["growth"])


def has_skills(config: Mapping[str, Any]) -> bool:
    """Says whether a checkpoint's config is that of several skills."""
    growth = config.get("growth")
    return isinstance(growth, dict) and growth.get("format_version") == SKILLS_VERSION


class OneSkill(Checkpoint):
    """Presents a checkpoint with several skills as the grown checkpoint of one of them. Raises UserError for another
    name."""

    def __init__(self, whole: Checkpoint, name: str):
        growth = whole.config["growth"]
        if name not in growth["skills"]:
            raise UserError(
                f"{whole.path}: --name {name}: there is no such skill; there are {', '.join(growth['skills'])}"
            )
        self.path, self.shards, self._files = whole.path, whole.shards, {}
        self.config = whole.config | {"growth": growth_of_skill(growth, name)}
        self.tensors = {
            of_skill(key, ""): info
            for key, info in whole.tensors.items()
            if not is_growth(key) or skill_of(key) == name
        }


def facts_of(path: Path, name: str) -> dict[str, Any]:
    """Returns growth.json as a checkpoint with one skill alone would have it."""
    whole = read_growth(path)
    sums = {of_skill(key, ""): digest for key, digest in whole["tensors"].items() if skill_of(key) == name}
    return growth_of_skill(whole, name) | {"tensors": sums, "base_tensors": whole["base_tensors"]}
