"""The metadata of a grown checkpoint, checked before anything relies on it.

config.json has it under "growth". growth.json has the same, and the checksums of all tensors, of all small files, and
its own; only README.md, which people edit, has none.
"""

import json
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from grow.checkpoint.card import grown_card
from grow.checkpoint.output import OutputFolder
from grow.checkpoint.shards import plain_name, read_json
from grow.checkpoint.switch_record import read_switch
from grow.errors import UserError
from grow.plan import SKILLS_VERSION, GrowthPlan, growth_of_skill

GROWTH_NAME = "growth.json"
# The base's files that growth replaces are kept here in a grown checkpoint, unchanged.
BASE_FOLDER = "base"
_OF_FILES = ("tensors", "base_tensors", "small_files", "xxh3_128")


def check_growth(growth: Any, where: Path) -> dict[str, Any]:
    """Returns "growth" as it is. Raises UserError, naming the file `where` it stands, if it makes no sense."""
    try:
        if growth["format_version"] == SKILLS_VERSION:
            for name, own in growth["skills"].items():
                if not 0 <= own["alpha"] <= 1 or not isinstance(name, str):
                    raise ValueError(f"{name} has no α")
                check_growth(growth_of_skill(growth, name), where)
            return growth
        GrowthPlan.from_config({"growth": growth})
        if not isinstance(growth["trained"], dict | None):
            raise TypeError("what is known of the training is no object")
        for name, facts in growth["base"]["files"].items():
            plain_name(name, where)
            plain_name(facts["name"], where)
            _check_checksums({name: facts["xxh3_128"]})
        if "switch" in growth:
            read_switch(growth["switch"], where)
        grown_card(growth)  # reads every field
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: its growth is not what this program writes ({error!r})") from None
    return growth


def _check_checksums(checksums: Any) -> None:
    if not all(isinstance(text, str) for item in checksums.items() for text in item):
        raise ValueError("checksums are needed")


def read_growth(folder: Path) -> dict[str, Any]:
    """Returns growth.json of a grown checkpoint or a growth package. Raises UserError if there is none that makes
    sense."""
    path = folder / GROWTH_NAME
    if not path.exists():
        raise UserError(
            f"{folder}: no growth there (it has no {GROWTH_NAME}): name a growth package, or a grown checkpoint"
        )
    facts = check_growth(read_json(path), path)
    try:
        for key in ("tensors", "base_tensors"):
            _check_checksums(facts[key])
    except (AttributeError, KeyError, ValueError):
        raise UserError(f"{path}: has no checksums of tensors") from None
    return facts


def without_checksums(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of growth.json's facts that stands in config.json too."""
    return {key: value for key, value in facts.items() if key not in _OF_FILES}


def write_growth(folder: OutputFolder, facts: dict[str, Any]) -> None:
    """Writes growth.json, with its own checksum, and the card."""
    folder.write_text("README.md", grown_card(facts))
    folder.write_text(GROWTH_NAME, _text(_sealed(facts)))


def write_metadata(folder: OutputFolder, facts: dict[str, Any], config: dict[str, Any]) -> None:
    """Writes the last files of a grown checkpoint: the card, growth.json, and config.json, which is the base's `config`
    with the growth in it. `facts` is what growth.json holds, but for the small files that are there already."""
    text = _text(config | {"growth": without_checksums(facts)})
    small = {
        str(file.relative_to(folder.partial)): xxh3_128(file.read_bytes()).hexdigest()
        for file in sorted(folder.partial.rglob("*"))
        if file.is_file() and file.suffix != ".safetensors"
    }
    small["config.json"] = xxh3_128(text.encode()).hexdigest()
    write_growth(folder, facts | {"small_files": small})
    folder.write_text("config.json", text)


def changed_files(folder: Path) -> list[str]:
    """Returns a line for each small file of a grown checkpoint that is not as it was written."""
    facts = read_json(folder / GROWTH_NAME)
    if (folder / GROWTH_NAME).read_text(encoding="utf-8") != _text(_sealed(facts)):
        return [f"{GROWTH_NAME}: changed since it was written (checksum)"]
    small = facts.get("small_files")
    if not isinstance(small, dict):
        raise UserError(
            f"{folder / GROWTH_NAME}: has no checksums of files: {folder} is a growth package; attach it to its base, "
            "and verify that"
        )
    problems = []
    for name, expected in small.items():
        plain_name(name.removeprefix(f"{BASE_FOLDER}/"), folder / GROWTH_NAME)
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: is missing")
        elif xxh3_128(file.read_bytes()).hexdigest() != expected:
            problems.append(f"{name}: changed since it was written (checksum)")
    return problems


def _sealed(facts: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in facts.items() if key != "xxh3_128"}
    return facts | {"xxh3_128": xxh3_128(_text(facts).encode()).hexdigest()}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
