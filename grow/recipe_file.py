"""Reads a recipe's file, and checks it."""

import dataclasses
import os
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from grow.errors import UserError, unknown
from grow.parts import FIELDS, grow_beside
from grow.plan import parse_factor
from grow.recipe import AUTO, NO_FIELDS, Recipe, own_grown
from grow.recipe_values import (
    begun_with,
    check_numbers,
    check_switch,
    find_deepspeed,
    find_file,
    read_values,
    whole_number,
)

Methods = Mapping[str, type[Any]]
"""The classes of methods (grow.methods.method.Method) by name, whose dataclass fields a recipe may have."""

METRICS = ("loss", "chrf", "accuracy")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# ~ and environment variables are expanded in these fields, and never in the text of a prompt or an option.
_PLACES = {
    "base", "grown", "data", "data_dir", "mix", "retention", "retention_sets", "kl_text", "chat_template", "deepspeed",
    "output_dir", "mlp_layers",
}  # fmt: skip


def field_types(methods: Methods) -> dict[str, Any]:
    """Returns the types of all fields that a recipe may have: one recipe serves several methods."""
    classes = (*methods.values(), Recipe)
    types_ = {f.name: get_type_hints(cls)[f.name] for cls in classes for f in dataclasses.fields(cls)}
    types_ |= {name: type(spec.default) for name, spec in FIELDS.items()}
    return {name: kind for name, kind in types_.items() if name not in NO_FIELDS}


def parse_recipe(path: str, overrides: Mapping[str, Any], methods: Methods) -> Recipe:
    """Reads a recipe, whose method is one of `methods`, and replaces fields by the overrides.

    A switch in it is for methods that add what can be off, and so is `average`, since checkpoints of these are small:
    where another method is among the overrides, there is neither (`left_out`). Raises UserError for any mistake in file
    or overrides. grow.methods.read_recipe knows all methods.
    """
    os.environ.setdefault("GROW_CACHE", os.path.expanduser("~/.cache/grow"))
    values = read_values(path)
    own = values.get("method", Recipe.method)
    named = overrides.get("method", own)
    method = methods.get(str(named))
    left_out: dict[str, Any] = {}
    if named != own and method is not None and not method.switches:
        wanted = {"switch", "average"} - set(overrides)
        left_out = {name: values.pop(name) for name in sorted(wanted & set(values))}
    return dataclasses.replace(_checked(values | dict(overrides), path, methods), left_out=left_out)


def recipe_of_run(run: str, overrides: Mapping[str, Any], methods: Methods) -> Recipe:
    """Returns the recipe of a run that has begun in a folder, where it lies now, with fields replaced by the overrides.
    Raises UserError if none has."""
    values = begun_with(run)
    if not values:
        raise UserError(f"{run}: no run has begun there (it has no run.json that says by which recipe)")
    where = {"output_dir": run.rstrip("/") or run}
    return _checked(values | where | dict(overrides), os.path.join(run, "run.json"), methods)


def _checked(values: dict[str, Any], path: str, methods: Methods) -> Recipe:
    """Makes a recipe of its values, which stand in the file `path`."""
    kinds = field_types(methods)
    for name in values:
        if name not in kinds:
            raise UserError(f"{path}: {unknown(str(name), kinds, 'field')}")
    for spec in dataclasses.fields(Recipe):
        if spec.default is spec.default_factory is dataclasses.MISSING and spec.name not in values:
            raise UserError(f"{path}: the field {spec.name} is missing")
    upper = {"layers": "upper", "lora_layers": "upper"} if values.get("switch") and not values.get("grown") else {}
    values = upper | ({"layers": "none"} if grow_beside(values) else {}) | values
    checked = {name: _coerce(name, value, kinds[name]) for name, value in values.items()}
    chosen = checked.get("method", Recipe.method)
    if chosen not in methods:
        raise UserError(f"{path}: {unknown(chosen, methods, 'method')}")
    method = methods[chosen]
    rates = checked.get("learning_rate")
    for name in rates if isinstance(rates, dict) else ():
        if name not in methods:
            raise UserError(f"{path}: learning_rate: {unknown(name, methods, 'method')}")
    own = {f.name for f in dataclasses.fields(method)}
    general = {f.name for f in dataclasses.fields(Recipe)}
    method_fields = {name: value for name, value in checked.items() if name in own}
    recipe = Recipe(
        **{name: value for name, value in checked.items() if name in general},
        method_class=method,
        method_fields=method_fields,
        part_fields={name: value for name, value in checked.items() if name in FIELDS},
    )
    return _resolve(recipe, path)


def _coerce(name: str, value: Any, wanted: Any) -> Any:
    """Converts a value from YAML or from the command line to its field's type, or raises UserError."""
    kinds = get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None or (value in ("null", "none") and type(None) in kinds):
        if type(None) in kinds:
            return None
    elif bool in kinds:
        if str(value).lower() in _SWITCH:
            return _SWITCH[str(value).lower()]
    elif isinstance(value, dict) or get_origin(wanted) is dict:
        if any(get_origin(kind) is dict for kind in kinds):
            pairs = list(value.items()) if isinstance(value, dict) else _pairs(name, str(value))
            return {_coerce(name, key, str): _coerce(f"{name}.{key}", item, float) for key, item in pairs}
    elif get_origin(wanted) is list:
        items = value if isinstance(value, list) else str(value).split(",")
        return [_coerce(name, item, str) for item in items]
    elif not isinstance(value, (list, bool)):
        try:
            if float in kinds:
                return float(value)
            if value == AUTO and name == "per_device_train_batch_size":
                return AUTO
            if int in kinds:
                return whole_number(str(value))
            if str in kinds:
                return os.path.expanduser(os.path.expandvars(str(value))) if name in _PLACES else str(value)
        except (ValueError, OverflowError):
            pass
    names = " or ".join("nothing" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds)
    raise UserError(f"{name}: {value!r} is not what it takes ({names})")


def _pairs(name: str, text: str) -> list[tuple[str, str]]:
    """Reads "a=1,b=2"."""
    parts = [part.rpartition("=") for part in text.split(",") if part]
    if not all(key for key, _, _ in parts):
        raise UserError(f"{name}: {text!r}: write {name.upper()}=NUMBER, several with commas")
    return [(key, item) for key, _, item in parts]


def _resolve(recipe: Recipe, path: str) -> Recipe:
    output_dir = recipe.output_dir.replace("{method}", recipe.method)
    if (recipe.prompt or recipe.messages) and bool(recipe.messages) == bool(recipe.completion):
        raise UserError(f"{path}: give either prompt and completion, or messages (a column of chat messages)")
    rate = recipe.learning_rate
    if isinstance(rate, dict):
        rate = rate.get(recipe.method)
    parse_factor(recipe.factor)
    check_numbers(recipe.values() | {"learning_rate": rate}, path)
    if recipe.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"{path}: dtype {recipe.dtype}: there are auto, bfloat16, float32 (Gemma 3 overflows in fp16)")
    for name in ("compile", "use_liger_kernel"):
        value = getattr(recipe, name)
        if value not in (AUTO, "true", "false"):
            raise UserError(f"{path}: {name} {value}: there are auto, true, false")
    check_switch(recipe.switch, path)
    if not all(share > 0 for share in recipe.mix.values()) or sum(recipe.mix.values()) >= 1:
        raise UserError(f"{path}: mix: shares are above 0, and below 1 together, since the rest is of data")
    if recipe.metric not in METRICS:
        raise UserError(f"{path}: metric: {unknown(recipe.metric, METRICS, 'metric')}")
    if (recipe.metric == "accuracy") != bool(recipe.options) or (recipe.options and not recipe.completion):
        raise UserError(
            f"{path}: metric: accuracy, options (all completions that there are) and completion go together"
        )
    if any(not option.strip() for option in recipe.options) or len(set(recipe.options)) < len(recipe.options):
        raise UserError(f"{path}: options: one is empty, or stands in it twice: {recipe.options}")
    if "$" in recipe.base + recipe.grown + recipe.data + recipe.output_dir:
        raise UserError(f"{path}: an environment variable in it is not set")
    if recipe.average > 1 and recipe.keep_best:
        raise UserError(f"{path}: keep_best takes one checkpoint, average {recipe.average} the mean of several")
    if recipe.chat_template and recipe.completion:
        raise UserError(f"{path}: chat_template is for messages, of which there are none")
    return dataclasses.replace(
        recipe,
        learning_rate=rate,
        grown=recipe.grown or (own_grown(output_dir) if recipe.method_class.grows else ""),
        deepspeed=find_deepspeed(path, recipe.deepspeed or begun_with(output_dir).get("deepspeed") or "zero1"),
        chat_template=find_file(path, "chat_template", recipe.chat_template),
        output_dir=output_dir,
    )
