"""Puts a recipe into transformers' and DeepSpeed's terms, and asks them what they would refuse.

`--check` builds the same arguments as a run does, DeepSpeed's configuration and the schedule too, on no device and for
as many ranks as are planned: so anything that the libraries refuse is reported in one line before anything is loaded.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from grow.errors import UserError, one_line
from grow.model.loading import compute_dtype
from grow.recipe import Recipe
from grow.training.deepspeed_json import complete_deepspeed

_SAME = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "seed", "output_dir", "logging_steps", "eval_steps", "save_steps", "report_to",
    "per_device_eval_batch_size", "dataloader_num_workers",
)  # fmt: skip
_UNKNOWN_STEPS = 1000
"""Stands for the number of steps where that depends on the length of the data."""


def planned_ranks() -> int:
    """Returns how many ranks there are, or will be if a run is only checked. Raises UserError if WORLD_SIZE is not a
    positive number."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if not ranks.isdecimal() or not int(ranks):
        raise UserError(f"WORLD_SIZE is {ranks!r}; it is the number of ranks")
    return int(ranks)


def compute_type(recipe: Recipe) -> Any:
    """Returns the torch.dtype that a run computes in: the recipe's, or what this machine is fast in."""
    return compute_dtype() if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def training_arguments(
    recipe: Recipe, steps: int, dtype: Any, kind: Any = None, universal: bool = False, resumed: bool = False
) -> Any:
    """Returns the recipe as transformers.TrainingArguments, or as a class derived from it, `kind`; `dtype` is a
    torch.dtype.

    `resumed` says that there is a checkpoint to resume from, `universal` that it is in DeepSpeed's universal layout
    (grow.training.resume).
    Raises UserError for a DeepSpeed JSON that contradicts the recipe, and whatever transformers raises.
    """
    settings = complete_deepspeed(recipe.deepspeed)
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    return (kind or TrainingArguments)(
        **{name: getattr(recipe, name) for name in _SAME},
        deepspeed=settings,
        max_steps=steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.train_batch_size // (planned_ranks() * recipe.micro_batch),
        bf16=dtype == torch.bfloat16,
        use_cpu=get_accelerator().device_name() == "cpu",
        eval_strategy="steps",
        # Of a run that goes by its lowest validation loss a resume adds none: it ends as it would have without.
        eval_on_start=not (resumed and recipe.follows_best),
        save_strategy="steps",
        metric_for_best_model="loss" if recipe.follows_best else None,
        greater_is_better=False if recipe.follows_best else None,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        disable_tqdm=True,  # lines instead of a bar (grow.training.progress)
    )


def check_output(path: str) -> None:
    """Raises UserError if a run's folder could not be made there, or not be written."""
    run = Path(path)
    try:
        if not path.strip() or (os.path.lexists(run) and not run.is_dir()):
            raise UserError(f"output_dir {path!r}: not a folder; give another")
        if os.path.lexists(run / "logs") and not (run / "logs").is_dir():
            raise UserError(f"{run / 'logs'}: not a folder, and TensorBoard's files go there; give it another name")
        place = next(folder for folder in (run, *run.parents) if os.path.lexists(folder))
        with tempfile.TemporaryDirectory(dir=place) as made:
            Path(made, *run.relative_to(place).parts[:1]).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"output_dir {path}: cannot be written ({reason})") from None


class _OnPaper(TrainingArguments):
    """Reaches for no device, and forms no process group."""

    device = torch.device("cpu")
    n_gpu = 1
    world_size = property(lambda self: planned_ranks())


def check_arguments(recipe: Recipe) -> None:
    """Asks transformers and DeepSpeed what they would refuse. Raises UserError, one line, for the first refusal."""
    steps = recipe.max_steps if recipe.max_steps > 0 else _UNKNOWN_STEPS
    try:
        with _refused(f"lr_scheduler_type {recipe.lr_scheduler_type}, or another field of the recipe"):
            arguments = training_arguments(recipe, steps, compute_type(recipe), _OnPaper)
        _check_deepspeed(recipe, arguments, steps)
        with _refused(f"lr_scheduler_type {recipe.lr_scheduler_type}, or a field of the optimizer"):
            _build_schedule(arguments, steps)
        with _refused(f"report_to {recipe.report_to}"):
            _build_reporters(arguments)
    finally:
        unset_hf_deepspeed_config()  # else the next model in this process would be partitioned as it says


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has kinds of its own
        reason = " ".join(one_line(error).replace("\\n", " ").split()) or type(error).__name__
        raise UserError(f"{what}: is refused ({reason[:300]})") from error


def _check_deepspeed(recipe: Recipe, arguments: Any, steps: int) -> None:
    filled = arguments.hf_deepspeed_config
    if filled.mismatches:
        found = re.sub(r"^- ds (.*) vs hf ", r"\1, the recipe's ", filled.mismatches[0])
        raise UserError(f'{recipe.deepspeed}: contradicts the recipe: {found}; write "auto" there')
    with _refused(recipe.deepspeed):
        # Some settings depend on the model's size; any size will do here.
        filled.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=64)), steps)
        own = dict(filled.config)
        # DeepSpeed, too, divides by the number of ranks, which is 1 here.
        own["train_batch_size"] = own["train_micro_batch_size_per_gpu"] * own["gradient_accumulation_steps"]
        DeepSpeedConfig(own)
    if filled.is_offload() and filled.config["zero_force_ds_cpu_optimizer"]:
        raise UserError(
            f"{recipe.deepspeed}: zero_force_ds_cpu_optimizer: resumed, DeepSpeed's own Adam does not end in the same "
            "bits; take it out"
        )


def _build_schedule(arguments: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate, weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2), eps=arguments.adam_epsilon,
    )  # fmt: skip
    schedule = get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(steps), steps, arguments.lr_scheduler_kwargs
    )
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        # DeepSpeed 0.19.8 gives it the batch size in place of the loss (engine.py, _take_model_step).
        raise ValueError("it follows the loss, which DeepSpeed does not give it")


def _build_reporters(arguments: Any) -> None:
    problem, hook = "", sys.unraisablehook
    sys.unraisablehook = lambda _: None  # some that could not be built complain again when they are deleted
    try:
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            try:
                reporter()
            except Exception as error:
                problem = problem or str(error)
    finally:
        sys.unraisablehook = hook
    if problem:
        raise ValueError(problem)
