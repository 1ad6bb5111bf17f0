"""A recipe: one YAML file with every setting of one run, read and checked.

Names are those of transformers.TrainingArguments; `train_batch_size` is DeepSpeed's, over all ranks. Environment
variables (`${GROW_CACHE}`) are expanded in fields that name a folder or a file. On the command line any field can be
given another value.
"""

import dataclasses
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from grow.errors import UserError, unknown
from grow.parts import FIELDS, grow_beside
from grow.plan import parse_factor
from grow.recipe_values import (
    FITTED,
    begun_with,
    check_numbers,
    check_switch,
    find_deepspeed,
    find_file,
    read_values,
    whole_number,
    zero_settings,
)

Methods = Mapping[str, type[Any]]
"""The classes of methods (grow.methods.method.Method) by name, whose dataclass fields a recipe may have."""

AUTO = "auto"
METRICS = ("loss", "chrf", "accuracy")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

_NO_FIELDS = ("method_class", "method_fields", "part_fields", "day")
# ~ and environment variables are expanded in these fields, and never in the text of a prompt or an option.
_PLACES = {
    "base", "grown", "data", "data_dir", "mix", "retention", "retention_sets", "kl_text", "chat_template", "deepspeed",
    "output_dir", "mlp_layers",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Holds all fields of a recipe except those of its method. Those without a default must be in the file."""

    # What is trained: a folder, or a name on the hub, of which `base_revision` is a branch, a tag or a commit.
    base: str
    base_revision: str | None = None
    method: str = "g_freeze"
    # Growth methods start from `grown`, an expanded checkpoint. Where none is named, launch/train.sh makes one in the
    # run's folder, of these layers (as for `expand --layers`) and by this factor. What else grows is said by the fields
    # of grow.parts, such as `attention`; with one of them MLPs grow only in the `layers` that are given. One that is
    # named has grown so, or is refused.
    grown: str = ""
    layers: str = "all"
    factor: int = 2

    # When what was trained acts (grow.model.switch): always unless given; "row", in rows that are like the task's, and
    # elsewhere the model is its base; "answer", in their answers alone; "token", decided for each token; "call:TEXT",
    # from TEXT in the prompt on. The MLPs that grow are then "upper" unless given, those above a third of the depth.
    switch: str = ""

    # Rows to learn from: a folder of JSONL, Parquet or CSV files, or a hub name, with its revision, the folder inside
    # and the configuration of its card. The templates name its columns.
    data: str = field(kw_only=True)
    data_revision: str | None = None
    data_dir: str | None = None
    data_config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    # Other data sets to learn from beside it, with the share of the sequences that are of each: {FOLDER: 0.1}, or
    # FOLDER=0.1 with commas. Their rows have the same columns, or prompt and completion, or a text.
    mix: dict[str, float] = field(default_factory=dict)
    # Without any of these, the columns called prompt and completion, or messages, are used as they are.
    prompt: str = ""
    completion: str = ""
    # Instead of the two templates: a column of chat messages, put into text by the tokenizer's chat template, or by one
    # in a file of your own (Jinja). A row's column `tools` is given to it too.
    messages: str = ""
    chat_template: str = ""
    # A column of images: a path, from the folder of the row's file or that of the data, an Image of datasets, or a list
    # of them. <image> in the text says where each stands; without one they stand first.
    images: str = ""
    # What `eval` measures beside the loss: "chrf" (and BLEU) of what the model writes; "accuracy" among the options,
    # which are all completions that there are.
    metric: str = "loss"
    options: list[str] = field(default_factory=list)
    # Rows that cannot be used (empty, too long, not UTF-8) are named and left out; more than this share ends the run.
    max_bad_rows: float = 0.01

    # Rows of what the base knows (retention), whose answers the trained model should still give.
    retention: str | None = None
    retention_prompt: str = "{prompt}"
    retention_completion: str = "{completion}"
    # More of them, for `eval` alone: folders whose rows have a text, or a prompt and a completion.
    # "FOLDER[:80]": the first 80.
    retention_sets: list[str] = field(default_factory=list)
    # So many of the rows of `retention` are scored whenever the validation loss is, in training; 0: none.
    probe_rows: int = 64

    # Rows are packed into sequences of max_length tokens; the batch sizes count such sequences. "auto" is the largest
    # power of two that fits on the devices, found as the run starts; train_batch_size stays as it is.
    max_length: int = 512
    train_batch_size: int = 8
    per_device_train_batch_size: int | str = 1
    per_device_eval_batch_size: int = 4
    # Processes on each rank that read rows, and images, ahead of training; 0: the rank itself.
    dataloader_num_workers: int = 0

    # The run. A number, or one for each method; by method and size where none is given (grow.methods.rates).
    learning_rate: float | dict[str, float] | None = None
    max_steps: int = -1
    num_train_epochs: float = 1.0
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    # Compute the layers' activations again in the backward pass instead of keeping them: less memory, a third slower.
    gradient_checkpointing: bool = False
    # sdpa, eager, flex_attention, flash_attention_2 or 3; auto is flash attention on GPUs where it is installed.
    attn_implementation: str = AUTO
    # torch.compile of the decoder layers: true, false, or auto, which is true on GPUs under ZeRO-1 and 2, without a
    # switch.
    compile: str = AUTO
    # Liger's kernels (pip install liger-kernel) for norms, rotary positions and gated products: true, false, or auto,
    # which is true on GPUs where they are installed and layers are not compiled.
    use_liger_kernel: str = AUTO
    # zero1, zero2, zero3 or zero3_offload (grow/training/deepspeed), or a DeepSpeed JSON of your own. ZeRO-1 unless
    # given, which sends least where the model fits; a run that has begun keeps its own.
    deepspeed: str = ""

    # What a run logs and keeps. "{method}" in output_dir is the method's name.
    output_dir: str = field(kw_only=True)
    logging_steps: int = 5
    eval_steps: int = 20
    save_steps: int = 20
    save_total_limit: int = 2
    # What counts is the checkpoint with the lowest validation loss, not the last one; and the run ends after so many
    # validations in a row that are not lower (0: never).
    keep_best: bool = False
    # What counts is the mean of so many of the last checkpoints (of every save_steps steps), which are kept for it; for
    # a rate that does not fall: lr_scheduler_type constant_with_warmup.
    average: int = 1
    early_stopping_patience: int = 0
    report_to: str = "tensorboard"

    # Not lines of the file: the class of the method (grow.methods.METHODS), the method's own fields in the file, those
    # of the parts that can grow, and the day that is given to a chat template which writes the date (today, unless the
    # run has begun).
    method_class: Any = None
    method_fields: dict[str, Any] = field(default_factory=dict)
    part_fields: dict[str, Any] = field(default_factory=dict)
    day: str = ""

    @property
    def zero(self) -> dict[str, Any]:
        """Returns the ZeRO settings of the DeepSpeed JSON. Raises UserError if they are not readable."""
        return zero_settings(self.deepspeed)

    @property
    def makes_grown(self) -> bool:
        """Says whether the run starts from a grown checkpoint that is made for it, in its folder."""
        return bool(self.method_class.grows) and self.grown == own_grown(self.output_dir)

    @property
    def plans_growth(self) -> bool:
        """Says whether anything of `growth` is other than its default."""
        return (self.layers, self.factor) != (Recipe.layers, Recipe.factor) or any(
            value != FIELDS[name].default for name, value in self.part_fields.items()
        )

    @property
    def growth(self) -> dict[str, Any]:
        """Returns what a run's own grown checkpoint is to be, as grow.checkpoint.expand takes it."""
        parts = {name: self.part_fields.get(name, spec.default) for name, spec in FIELDS.items()}
        return {"layers": self.layers, "factor": self.factor} | parts

    @property
    def growth_flags(self) -> list[str]:
        """Returns the same as flags of `grow expand`."""
        return [f"--{name}" + f"={value}" * (value is not True) for name, value in self.growth.items() if value]

    @property
    def start(self) -> str:
        """Returns the checkpoint that training starts from."""
        return self.grown if self.method_class.grows else self.base_name

    @property
    def base_name(self) -> str:
        """Returns the base as commands take it: a folder, or "organisation/model@revision"."""
        here = not self.base_revision or os.path.isdir(self.base)
        return self.base if here else f"{self.base}@{self.base_revision}"

    @property
    def follows_best(self) -> bool:
        """Says whether the lowest validation loss decides what is kept, or when the run ends."""
        return self.keep_best or self.early_stopping_patience > 0

    @property
    def kept_checkpoints(self) -> int:
        """Returns how many of its last checkpoints a run keeps."""
        return max(self.save_total_limit, self.average)

    @property
    def micro_batch(self) -> int:
        """Returns per_device_train_batch_size; 1 where it is still to be found."""
        size = self.per_device_train_batch_size
        return size if isinstance(size, int) else 1

    @property
    def fits_switch(self) -> bool:
        """Says whether the run fits a switch before it trains."""
        return self.switch in FITTED

    def on(self, day: str) -> "Recipe":
        """Returns the same recipe with another day."""
        return dataclasses.replace(self, day=day)

    def make_method(self) -> Any:
        """Returns the method (grow.methods.method.Method), with its fields set."""
        return self.method_class(**self.method_fields)

    def values(self) -> dict[str, Any]:
        """Returns every field by name, the method's among them."""
        own = dataclasses.asdict(self.make_method())
        general = {name: value for name, value in dataclasses.asdict(self).items() if name not in _NO_FIELDS}
        return general | self.growth | own


def field_types(methods: Methods) -> dict[str, Any]:
    """Returns the types of all fields that a recipe may have: one recipe serves several methods."""
    classes = (*methods.values(), Recipe)
    types_ = {f.name: get_type_hints(cls)[f.name] for cls in classes for f in dataclasses.fields(cls)}
    types_ |= {name: type(spec.default) for name, spec in FIELDS.items()}
    return {name: kind for name, kind in types_.items() if name not in _NO_FIELDS}


def parse_recipe(path: str, overrides: Mapping[str, Any], methods: Methods) -> Recipe:
    """Reads a recipe, whose method is one of `methods`, and replaces fields by the overrides.

    A switch in it is for methods that add what can be off, and so is `average`, since checkpoints of these are small:
    where another method is among the overrides, there is neither. Raises UserError for any mistake in file or
    overrides. grow.methods.read_recipe knows all methods.
    """
    os.environ.setdefault("GROW_CACHE", os.path.expanduser("~/.cache/grow"))
    values, method = read_values(path), methods.get(str(overrides.get("method")))
    if method is not None and not method.switches:
        values = {name: value for name, value in values.items() if name not in ("switch", "average")}
    return _checked(values | dict(overrides), path, methods)


def recipe_of_run(run: str, methods: Methods) -> Recipe:
    """Returns the recipe of a run that has begun in a folder, where it lies now. Raises UserError if none has."""
    values = begun_with(run)
    if not values:
        raise UserError(f"{run}: no run has begun there (it has no run.json that says by which recipe)")
    return _checked(values | {"output_dir": run}, os.path.join(run, "run.json"), methods)


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


def own_grown(output_dir: str) -> str:
    """Returns the folder of a run's own grown checkpoint."""
    return os.path.join(output_dir, "grown")


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
