"""The model card, README.md with front matter, of a checkpoint that is written: what it grew from, under which
licence, which layers, trained on what, with which scores."""

from pathlib import Path
from typing import Any

import yaml

from grow.checkpoint.hub import hub_name
from grow.checkpoint.shards import Checkpoint
from grow.parts import grown_words
from grow.plan import GrowthPlan, growth_of_skill

_MAX_CARD = 2**16  # characters; reading YAML is slow
_LICENSE_FIELDS = ("license", "license_name", "license_link")


def base_facts(base: Checkpoint) -> dict[str, Any]:
    """Returns a base's name, and its licence as its own card has it: {"name": …, "license": …, …}."""
    facts = {"name": hub_name(base.path) or base.path.resolve().name}
    card = base.path / "README.md"
    front = _front_matter(card) if card.is_file() else {}
    return facts | {field: front[field] for field in _LICENSE_FIELDS if isinstance(front.get(field), str)}


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            opening, front, _ = file.read(_MAX_CARD).split("---\n", 2)
        values = yaml.safe_load(front) if not opening.strip() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def copies_start(factor: int) -> str:
    """Returns what a model computes at first whose copies came from another one, in words."""
    return "the mean of both" if factor == 2 else f"the base's 1/{factor} and {factor - 1}/{factor} of the other"


def grown_card(growth: dict[str, Any]) -> str:
    """Returns the card of a grown checkpoint, from its metadata (config.json's "growth")."""
    base = growth["base"]
    if "skills" in growth:
        return _card(base, "With several skills", _skills(growth))
    text = f"Grown from `{base['name']}`: {_grown(growth)}. "
    text += "The base's weights are in it, bit for bit (`grow base` takes them out again). "
    elsewhere = growth.get("copies_from")
    if elsewhere:
        text += f"Its copies are of the MLPs of `{elsewhere}`: α = 0 is the base. "
    if growth["trained"] is None:
        does = copies_start(growth["factor"]) if elsewhere else "what its base does"
        text += f"Nothing has been trained yet: it computes {does}."
    title = "Grown, not trained" if growth["trained"] is None else "Grown and trained"
    text += _own_alphas(growth) + _switch(growth)
    return _card(base, title, text + _training(growth["trained"] or {}) + _scores(growth.get("scores")))


def _skills(growth: dict[str, Any]) -> str:
    lines = [
        f"Grown from `{growth['base']['name']}`, with several skills beside it. The base's weights are in it, bit for "
        "bit (`grow base` takes them out again), and each skill comes out as it went in (`grow growth --name`).",
        "",
    ]
    for name, own in growth["skills"].items():
        trained = own["trained"] or {}
        learnt = f"trained by `{trained['method']}` on `{trained['data']}`" if "method" in trained else "growth"
        switch = ", with a switch" if "switch" in own else ""
        lines.append(f"- `{name}`: {_grown(growth_of_skill(growth, name))}, {learnt}, α = {own['alpha']:g}{switch}")
    return "\n".join(lines)


def stock_card(
    base: dict[str, Any], growth: dict[str, Any] | None, about: dict[str, Any], scores: dict[str, Any], alpha: float
) -> str:
    """Returns the card of a stock checkpoint at an interpolation coefficient.

    `base` is as base_facts returns it; `growth` is the checkpoint's metadata if it grew; `about` holds the facts of the
    training; `scores` are those of `eval`.
    """
    if growth and "skills" in growth:
        names = ", ".join(f"`{name}` (α = {own['alpha']:g})" for name, own in growth["skills"].items())
        text = f"Made from `{base['name']}` with the skills {names}, all on, joined to one plain MLP a layer. "
    elif growth:
        text = (
            f"Made from `{base['name']}` by growing {_grown(growth)}; its added copies were trained, then joined to "
            "one plain model. "
        ) + _own_alphas(growth)
    else:
        text = f"Made from `{base['name']}`, with its own shape. "
    if alpha != 1:
        text += f"α = {alpha:g}: between the base (0) and the trained model (1). "
    return _card(base, "Trained", text + _training(about) + _scores(scores))


def _grown(growth: dict[str, Any]) -> str:
    plan = GrowthPlan.from_config({"growth": growth})
    assert plan is not None
    return grown_words(plan)


def _own_alphas(growth: dict[str, Any]) -> str:
    alphas = growth.get("alphas")
    if not alphas:
        return ""
    return f"Each layer has an α of its own, between the base (0) and what was trained (1): {alphas}. "


def _switch(growth: dict[str, Any]) -> str:
    if "switch" not in growth:
        return ""
    bound = growth["switch"]["facts"].get("opens_at_most")
    text = (
        "It has a switch: what was trained acts in rows like the task's; elsewhere the model is its base, bit for bit. "
    )
    return text + (f"At most {bound:.1%} of rows such as the base writes itself open it. " if bound else "")


def _training(about: dict[str, Any]) -> str:
    if "method" not in about:
        return ""
    lines = [f"\n\nTrained by `{about['method']}` for {about['steps']} steps on `{about['data']}`."]
    if "averaged_steps" in about:
        lines.append(f"The mean of the checkpoints after steps {', '.join(map(str, about['averaged_steps']))}.")
    validation = about.get("validation_loss")
    if validation:
        lines.append(f"Validation loss: {validation[0]:.4f} at first, {validation[-1]:.4f} at the end.")
    return "\n".join(lines)


def _scores(scores: dict[str, Any] | None) -> str:
    if not scores:
        return ""
    lines = ["\n\n| | loss | token accuracy | exact match | rows |", "|---|---|---|---|---|"]
    for part, s in scores.items():
        shares = f"{s['token_accuracy']:.1%} | {s['exact_match']:.1%}"
        lines.append(f"| {part} | {s['loss']:.4f} | {shares} | {s['rows']} |")
    return "\n".join(lines)


def _card(base: dict[str, Any], title: str, text: str) -> str:
    front: dict[str, Any] = {"base_model": base["name"], "library_name": "transformers", "tags": ["grow"]}
    front |= {field: base[field] for field in _LICENSE_FIELDS if field in base}
    licence = (
        f"Licence: that of the base, {base['license']}."
        if "license" in base
        else "Licence: that of the base, which its files do not name; its terms pass to what is made of it."
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {title}: {base['name']}\n\n{text}\n\n{licence}\n"
