"""A recipe: every setting of one run, one YAML file (recipe_file.py reads it).

Names are those of transformers.TrainingArguments; `train_batch_size` is DeepSpeed's, over all ranks. Environment
variables (`${GROW_CACHE}`) are expanded in fields that name a folder or a file. On the command line any field can be
given another value.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from grow.parts import FIELDS
from grow.recipe_values import FITTED, zero_settings

AUTO = "auto"

NO_FIELDS = ("method_class", "method_fields", "part_fields", "day", "left_out")
"""What of a Recipe is no line of a file."""


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
    # What the file says and another method, named on the command line, does without.
    left_out: dict[str, Any] = field(default_factory=dict)

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
        general = {name: value for name, value in dataclasses.asdict(self).items() if name not in NO_FIELDS}
        return general | self.growth | own


def own_grown(output_dir: str) -> str:
    """Returns the folder of a run's own grown checkpoint."""
    return os.path.join(output_dir, "grown")
