"""transformers.Trainer on DeepSpeed, with what it gets wrong for a mostly frozen model put right.

Schedules, logging, TensorBoard and the loop are Trainer's. Here: the loss (labels only), checkpoints that hold what
trains and no more and are marked when complete, resuming from them, and validation that ranks share out exactly.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn

from grow.checkpoint.run_folder import clear_place, fsync_and_hash, mark_complete, remove_old_checkpoints
from grow.checkpoint.zero import ZeroCheckpoint
from grow.data.examples import IGNORED
from grow.data.packing import Epochs, PackedDataset, collate
from grow.errors import Fault, UserError, one_line
from grow.methods import Method
from grow.model.gather import gathered
from grow.model.loss import labelled_logits, loss_sum, token_scores
from grow.names import canonical
from grow.recipe import Recipe
from grow.training.adam_step import step_by_blocks
from grow.training.callbacks import GracefulShutdown, ThroughputMeter
from grow.training.checkpoint_engine import StreamEngine
from grow.training.flops import StepFlops
from grow.training.gradient_norm import one_pass_norm
from grow.training.probe import Probe
from grow.training.resume import load_checkpoint


class GrowTrainer(transformers.Trainer):
    """Trainer over packed sequences, by a recipe's method. `validation` is scored every `eval_steps`."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        method: Method,
        watch: GracefulShutdown,
        probe: Probe | None,
        sequences: Epochs,
        validation: PackedDataset,
        **kwargs: Any,
    ):
        super().__init__(
            train_dataset=sequences, eval_dataset=validation, data_collator=collate, callbacks=[watch], **kwargs
        )
        self.watch, self.probe = watch, probe
        self.pace = ThroughputMeter(StepFlops(self.model), self.args.world_size)
        self.loss_is_scaled_for_ga = True
        self.recipe, self.method = recipe, method
        self.model.register_state_dict_post_hook(drop_frozen)

    # The loss: the mean over all labels of the global batch, whatever the ranks and the accumulation.

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        labels = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        tokens = sum((batch["rows"] >= 0).sum() for batch in batch_samples)
        counts = self.accelerator.reduce(torch.as_tensor([labels, tokens], device=device), "sum")
        self.pace.step(counts)
        # A method may take labels away; a batch that has none left has no loss, not one of 0/0.
        return counts[0].clamp(min=1)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with a watch held to it."""
        start = time.monotonic()
        samples = super().get_batch_samples(*args, **kwargs)
        self.pace.waited += time.monotonic() - start
        return samples

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this micro-batch in the mean loss, times world_size, since DeepSpeed averages over ranks."""
        logits, labels = labelled_logits(model, inputs)
        weights = self.method.token_weights(inputs["rows"][inputs["labels"] != IGNORED])
        loss = loss_sum(logits, labels, weights) / num_items_in_batch * self.accelerator.num_processes
        self.watch.saw(loss)
        return loss + self.method.penalty() / self.args.gradient_accumulation_steps

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's own estimate walks through all parameters in every step; ours is grow.training.flops."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer counts the whole run as one epoch; what is logged is the true one."""
        step, batch = self.state.global_step, self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.state.epoch = step * batch * self.args.world_size / len(self.train_dataset.sequences)
        if "loss" in logs:
            logs |= self.pace.take()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Over the validation rows' labels: the mean loss, and the share that are the likeliest token."""
        start = time.monotonic()
        total = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in self.own_batches(self.eval_dataset):
            with self.compute_loss_context_manager():
                logprobs, hits, _ = token_scores(self.model_wrapped, batch)
            total += torch.stack([-logprobs.double().sum(), hits.double().sum(), total.new_tensor(len(hits))])
        loss, right, count = self.accelerator.reduce(total, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / count, f"{metric_key_prefix}_accuracy": right / count}
        if self.probe is not None:
            metrics |= self.probe.measure(self)
        self.pace.aside(time.monotonic() - start)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def start_losses(self) -> list[Tensor]:
        """The loss in nats of every label of the training rows that the run comes to, in the model as it is: one tensor
        an example, fp32, as long as its labels, NaN where there is none and for all other rows. The rows are shared out
        to the ranks; each has all losses."""
        sequences = self.train_dataset.sequences
        lengths = sequences.examples.lengths.tolist()
        starts = torch.tensor([0, *lengths], device=self.args.device).cumsum(0)
        losses = torch.zeros(sum(lengths), device=self.args.device)
        counted = torch.zeros_like(losses)
        for batch in self.own_batches(self.train_dataset.seen()):
            with self.compute_loss_context_manager():
                logprobs, _, rows = token_scores(self.model_wrapped, batch)
            places = starts[rows] + batch["position_ids"][batch["labels"] != IGNORED]
            losses[places], counted[places] = -logprobs, 1.0
        losses, counted = self.accelerator.reduce(torch.stack([losses, counted]), "sum")
        return list(losses.masked_fill(counted == 0, torch.nan).split(lengths))

    def own_batches(self, sequences: Any) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the sequences, for a forward pass. All ranks have as many batches (ZeRO-3 gathers
        weights in each); sequences that fill the last ones up have no labels."""
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        self.model_wrapped.eval()
        for start in range(0, len(sequences), size * world):
            places = [start + rank * size + i for i in range(size)]
            batch = self._prepare_inputs(collate([sequences[i % len(sequences)] for i in places]))
            for i, place in enumerate(places):
                if place >= len(sequences):
                    batch["labels"][i] = IGNORED
            yield batch

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's, over ZeRO's optimizer too, which lacks the rates of the one inside that a schedule may ask for."""
        zero = getattr(optimizer or self.optimizer, "optimizer", None)  # inside accelerate's own
        if zero is not None and not hasattr(zero, "defaults"):
            zero.defaults = zero.optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints: what trains, nothing else.

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
            parts = gather_object([fsync_and_hash(folder, self.args.process_index, self.files.written)])
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
            free = shutil.disk_usage(self.args.output_dir).free / 1e6
            raise Fault(
                f"{folder}: cannot be written ({free:.0f} MB free; {one_line(error)[:200]}); mend that and run the same"
                " command again: it goes on from the last complete checkpoint"
            ) from error
        if self.args.should_save:
            mark_complete(folder, {name: facts for part in parts for name, facts in part.items()})
            remove_old_checkpoints(folder.parent, self.state.global_step, self.recipe.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Trainer would load strictly and fail on what a checkpoint leaves out; so we load, and check, ourselves."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_wrapped.checkpoint_engine = self.files = StreamEngine()
        one_pass_norm(self.model_wrapped.optimizer)
        step_by_blocks(self.model_wrapped.optimizer)
        self.method.begin(self)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            zero = ZeroCheckpoint(folder)
            if set(zero.trained) != trained_names(self.model):
                raise UserError(f"{folder}: holds other parameters than this recipe trains")
            load_checkpoint(self.model_wrapped, zero, folder)
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
