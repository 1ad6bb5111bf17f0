"""The values of a recipe: read from YAML as they are typed, and checked.

The type of a value depends on its field, not on its spelling: to YAML 5e-5 is text, `yes` a switch, 0123 an octal
number and 2024-01-01 a date. So values are read as text, like those of a command line, and grow.recipe_file converts
them to the types of their fields.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from grow.errors import UserError, unknown

_LARGEST = 2**31 - 1
_DEEPSPEED = Path(__file__).parent / "training" / "deepspeed"
_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")

_COUNTS = (
    "max_length", "train_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps",
    "eval_steps", "save_steps", "save_total_limit", "adapter_size", "lora_rank", "ewc_rows", "average",
)  # fmt: skip
# The least value of each number; one that is not here must only be finite.
_LEAST = dict.fromkeys(_COUNTS, 1) | {"max_steps": -1} | dict.fromkeys(
    ("seed", "warmup_steps", "dataloader_num_workers", "probe_rows", "early_stopping_patience", "max_bad_rows",
     "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2"), 0
)  # fmt: skip
_MOST = {"seed": 2**32 - 1, "max_bad_rows": 1, "num_train_epochs": 10**6}
_ABOVE_0 = ("num_train_epochs", "adam_epsilon", "lora_alpha")
_BELOW_1 = ("adam_beta1", "adam_beta2")


class _AsTyped(yaml.SafeLoader):
    """Reads every plain value as text, except null. Raises ConstructorError for a name that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a name that stands twice, of which SafeLoader would take the last value."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAGS[1]:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands in it twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_AsTyped.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_values(path: str) -> dict[str, Any]:
    """Returns the fields of a recipe's file, their values as text, null, a list or a mapping of these.

    Raises UserError if the file is not there, is not YAML, or holds anything but fields and their values.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _AsTyped)
    except OSError as error:
        raise UserError(f"{path}: no recipe there ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a list of `field: value` lines")
    return values


def whole_number(text: str) -> int:
    """Reads a whole number, also one written 1e3 or 8.0. Raises ValueError or OverflowError for anything else."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def check_numbers(values: Mapping[str, Any], path: str) -> None:
    """Raises UserError for a number outside the range of its field."""
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            problem = _problem(name, value)
            if problem:
                raise UserError(f"{path}: {name} must be {problem}, not {value}")
    if values["max_steps"] == 0:
        raise UserError(f"{path}: max_steps must be at least 1, or -1, which leaves it to num_train_epochs")


def _problem(name: str, value: float) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if value < _LEAST.get(name, -math.inf):
        return f"at least {_LEAST[name]}"
    if value > _MOST.get(name, _LARGEST if isinstance(value, int) else math.inf):
        return f"at most {_MOST.get(name, _LARGEST)}"
    if name in _ABOVE_0 and value <= 0:
        return "more than 0"
    return "below 1" if name in _BELOW_1 and value >= 1 else None


def find_file(recipe: str, name: str, value: str) -> str:
    """Returns the path of a file that a recipe names, relative to the working folder or to the recipe's. Raises
    UserError if there is none."""
    if not value:
        return ""
    file = Path(value)
    if not file.is_absolute() and not file.exists():
        file = Path(recipe).parent / file
    if not file.is_file():
        raise UserError(f"{recipe}: {name}: no such file: {value}")
    return str(file.resolve())


def find_deepspeed(recipe: str, value: str) -> str:
    """Returns the path of a recipe's DeepSpeed JSON: one of ours by its name, such as zero1, or a file.

    Raises UserError if there is no such file.
    """
    ours = {path.stem: path for path in _DEEPSPEED.glob("*.json")}
    if value in ours:
        return str(ours[value])
    place, stem = Path(value), Path(value).stem
    there = place.exists() or (Path(recipe).parent / place).exists()
    if stem in ours and place.parent.name == "deepspeed" and not there:
        return str(ours[stem])  # older recipes named ours by their path in the repository
    return find_file(recipe, "deepspeed", value)


FITTED = ("row", "answer", "token")
"""The switches that are fitted to the task; "call:TEXT" is not."""


def check_switch(switch: str, path: str) -> None:
    """Raises UserError for a switch that there is not; "" is none. `path` is the recipe's, for the message."""
    if switch and switch not in FITTED and not switch.startswith("call:"):
        raise UserError(f"{path}: switch: {unknown(switch, [*FITTED, 'call:TEXT'], 'switch')}")
    if switch == "call:":
        raise UserError(f"{path}: switch: call: needs the text of the prompt from which the skill is on, call:TEXT")


def begun_with(output_dir: str) -> dict[str, Any]:
    """Returns the recipe in the run.json of the run that has begun in a folder; an empty one if none has."""
    try:
        begun = json.loads(Path(output_dir, "run.json").read_text(encoding="utf-8")).get("recipe")
    except (OSError, ValueError, AttributeError):
        return {}  # that run.json cannot be read is reported when the run resumes
    return begun if isinstance(begun, dict) else {}


def read_deepspeed(path: str | Path) -> dict[str, Any]:
    """Returns the settings in a DeepSpeed JSON. Raises UserError if it is not a JSON object, or holds a name twice."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_no_name_twice)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not JSON, which has no comments and no comma at a list's end ({reason})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object, {{…}}")
    return settings


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands in it twice")
    return dict(pairs)


def zero_settings(path: str | Path) -> dict[str, Any]:
    """Returns the file's ZeRO settings. Raises UserError if they are not an object with a stage from 0 to 3."""
    zero = read_deepspeed(path).get("zero_optimization") or {}
    if not isinstance(zero, dict):
        raise UserError(f'{path}: zero_optimization is {zero!r}; it is an object, such as {{"stage": 2}}')
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; it is 0, 1, 2 or 3")
    return zero
