"""Checkpoints hold only what trains, and are marked when they are complete; runs resume from them.

transformers.Trainer has no public way to do either: it writes the whole model, and loads strictly, which fails on
parameters that a checkpoint leaves out (asked for in huggingface/transformers#26503 and #29015, given to PEFT's models
alone). So three of its private methods are overridden here, after a check that it still has them.
"""

import os
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn

from grow.checkpoint.run_folder import (
    best_step,
    clear_place,
    fsync_and_hash,
    losses_of,
    mark_complete,
    remove_old_checkpoints,
)
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import Fault, UserError, one_line
from grow.training.deepspeed_patches import add_defaults, patch_engine
from grow.training.resume import load_checkpoint

_OVERRIDDEN = {
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
}
"""The signatures of Trainer's private methods in transformers 5.23, for which this was written."""


def check_trainer() -> None:
    """Raises UserError if the installed Trainer lacks a method that is overridden here, which it would ignore
    silently."""
    for name, parameters in _OVERRIDDEN.items():
        method = getattr(transformers.Trainer, name, None)
        if method is None or list(signature(method).parameters) != parameters:
            raise UserError(
                f"transformers {transformers.__version__}: its Trainer has another {name} than checkpoints here need; "
                "install the version that requirements.txt names"
            )


class CheckpointingTrainer(transformers.Trainer):
    """Writes checkpoints of what trains, and resumes from them: `zero` is the one to resume from, opened.

    A class derived from it has `recipe` and `method`.
    """

    recipe: Any
    method: Any

    def __init__(self, zero: ZeroCheckpoint | None = None, **kwargs: Any):
        check_trainer()
        super().__init__(**kwargs)
        self.zero = zero
        self.model.register_state_dict_post_hook(drop_frozen)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns Trainer's schedule, over ZeRO's optimizer too."""
        add_defaults(optimizer or self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes nothing: the ZeRO checkpoint has what trained, and `grow consolidate` makes models of it."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_place(folder)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            # What DeepSpeed's own engine wrote is read back for its checksum.
            written = getattr(self.model_wrapped.checkpoint_engine, "written", {})
            parts = gather_object([fsync_and_hash(folder, self.args.process_index, written)])
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
            free = shutil.disk_usage(self.args.output_dir).free / 1e6
            raise Fault(
                f"{folder}: cannot be written ({free:.0f} MB free; {one_line(error)[:200]}); mend that and run the same"
                " command again: it resumes from the last complete checkpoint"
            ) from error
        if self.args.should_save:
            mark_complete(folder, {name: facts for part in parts for name, facts in part.items()})
            best = best_step(losses_of(self.state.log_history)) if self.recipe.keep_best else 0
            every = self.recipe.save_steps if self.recipe.average > 1 else 1
            remove_old_checkpoints(folder.parent, self.state.global_step, self.recipe.kept_checkpoints, best, every)
        self.accelerator.wait_for_everyone()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # loads nothing
        patch_engine(self.model_wrapped)
        self.method.begin(self)
        zero, self.zero = self.zero, None  # its files are mapped only until they are loaded
        if zero is not None:
            folder = Path(resume_from_checkpoint)
            if set(zero.trained) != trained_names(self.model):
                raise UserError(f"{folder}: holds other parameters than this recipe trains")
            load_checkpoint(self.model_wrapped, zero, folder)
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        return prepared


def drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Removes everything but the trained parameters from a state dict, as its hook, and keeps each under one name.
    DeepSpeed's own exclude_frozen_parameters keeps the second name of tied embeddings, a head of their size."""
    trained = trained_names(module)
    for name in list(state):
        if name.removeprefix(prefix) not in trained:
            del state[name]


def trained_names(module: nn.Module) -> set[str]:
    """Returns the names of the parameters that train."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
