"""transformers.Trainer on DeepSpeed, with what it gets wrong for a mostly frozen model put right.

Schedules, logging, TensorBoard and the loop are Trainer's. Here: the loss (labels only), checkpoints that hold what
trains and no more and are marked when complete, resuming from them, and validation that ranks share out exactly.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import rotate_checkpoints

from grow.callbacks import Watch
from grow.checkpoint.run_folder import seal, settle
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import Fault, UserError, one_line
from grow.loss import labelled_logits, loss_sum
from grow.plan import canonical
from grow.tasks import IGNORED, Epochs, PackedDataset, collate


class GrowTrainer(transformers.Trainer):
    """Trainer over packed sequences. `validation` is scored every `eval_steps`."""

    def __init__(
        self, *, sequences: Epochs, validation: PackedDataset, save_total_limit: int, watch: Watch, **kwargs: Any
    ):
        super().__init__(
            train_dataset=sequences, eval_dataset=validation, data_collator=collate, callbacks=[watch], **kwargs
        )
        self.watch = watch
        self.loss_is_scaled_for_ga = True
        self.keep_checkpoints = save_total_limit
        self.model.register_state_dict_post_hook(drop_frozen)

    # The loss: the mean over all labels of the global batch, whatever the ranks and the accumulation.

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        labels = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(labels, device=device), "sum")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this micro-batch in the mean loss, times world_size, since DeepSpeed averages over ranks."""
        logits, labels = labelled_logits(model, inputs)
        loss = loss_sum(logits, labels) / num_items_in_batch * self.accelerator.num_processes
        self.watch.saw(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer counts the whole run as one epoch; what is logged is the true one."""
        step, batch = self.state.global_step, self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.state.epoch = step * batch * self.args.world_size / len(self.train_dataset.sequences)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean loss per label over the validation rows. Every rank runs as many batches (ZeRO-3 gathers weights)."""
        sequences, size = self.eval_dataset, self.args.per_device_eval_batch_size
        world, rank = self.args.world_size, self.args.process_index
        self.model_wrapped.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for start in range(0, len(sequences), size * world):
            places = [start + rank * size + i for i in range(size)]
            batch = self._prepare_inputs(collate([sequences[i % len(sequences)] for i in places]))
            for i, place in enumerate(places):
                if place >= len(sequences):
                    batch["labels"][i] = IGNORED
            with self.compute_loss_context_manager():
                logits, labels = labelled_logits(self.model_wrapped, batch)
            total += torch.stack([loss_sum(logits, labels).double(), labels.new_tensor(len(labels)).double()])
        loss, count = self.accelerator.reduce(total, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / count}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints: what trains, nothing else.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes nothing: the ZeRO checkpoint has what trained, and `python -m grow consolidate` makes models of it."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # of an attempt that died here
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            parts = gather_object([settle(folder, self.args.process_index)])
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
            free = shutil.disk_usage(self.args.output_dir).free / 1e6
            raise Fault(
                f"{folder}: cannot be written ({free:.0f} MB free; {one_line(error)[:200]}); mend that and run the same"
                " command again: it goes on from the last complete checkpoint"
            ) from error
        if self.args.should_save:
            seal(folder, {name: facts for part in parts for name, facts in part.items()})
            rotate_checkpoints(self.args.output_dir, self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Trainer would load strictly and fail on what a checkpoint leaves out; so we load, and check, ourselves."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            if set(ZeroCheckpoint(Path(resume_from_checkpoint)).trained) != trained_names(self.model):
                raise UserError(f"{resume_from_checkpoint}: holds other parameters than this recipe trains")
            path, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if path is None:
                raise UserError(f"{resume_from_checkpoint}: DeepSpeed cannot resume from it; remove it to go back one")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared


def drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A state dict hook that leaves what trains, each parameter under one name. DeepSpeed's own
    exclude_frozen_parameters keeps the second name of tied embeddings, a head of their size."""
    trained = trained_names(module)
    for name in list(state):
        if name.removeprefix(prefix) not in trained:
            del state[name]


def trained_names(module: nn.Module) -> set[str]:
    """The names of the parameters that train."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def gathered(parameter: nn.Parameter) -> Any:
    """The whole parameter on every rank, also where ZeRO-3 keeps it in partitions."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def changed_frozen(model: nn.Module, on_disk: dict[str, Any], read: Any) -> list[str]:
    """Names of the frozen parameters that are not, bit for bit, what the starting checkpoint holds, on any rank.

    `on_disk` maps a parameter's canonical name to its name in the checkpoint, which `read` reads.
    """
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        with gathered(parameter):
            kept = torch.equal(parameter.detach().cpu(), read(on_disk[canonical(name)]).to(parameter.dtype))
        verdict = torch.tensor(int(not kept), device=parameter.device)
        if dist.is_initialized():
            dist.all_reduce(verdict)
        if verdict.item():
            changed.append(name)
    return changed
