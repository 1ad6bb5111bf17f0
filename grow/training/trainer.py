"""GrowTrainer is transformers.Trainer, corrected for a mostly frozen model.

Schedules, logging, TensorBoard and the loop are Trainer's. Here are the loss (labels only), and validation shared out
exactly among ranks; checkpoints are in grow.training.trainer_checkpoints.
"""

import itertools
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback

from grow.data.labels import IGNORED
from grow.data.packing import Epochs, PackedDataset, collate
from grow.methods import Method
from grow.model.gather import gathered
from grow.model.head import Head, head_loss_sum, head_scores, known_head
from grow.names import canonical, of_language_model
from grow.recipe import Recipe
from grow.training.best import BestCheckpoint
from grow.training.callbacks import GracefulShutdown, ThroughputMeter
from grow.training.compiling import not_compiled
from grow.training.flops import StepFlops
from grow.training.probe import Probe
from grow.training.progress import ProgressLines
from grow.training.trainer_checkpoints import CheckpointingTrainer


class GrowTrainer(CheckpointingTrainer):
    """Trains on packed sequences by a recipe's method. `validation` is scored every `eval_steps`."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        method: Method,
        shutdown: GracefulShutdown,
        about: str,
        probe: Probe | None,
        sequences: Epochs,
        validation: PackedDataset,
        **kwargs: Any,
    ):
        best = [BestCheckpoint(recipe.keep_best, recipe.early_stopping_patience)] if recipe.follows_best else []
        callbacks = [shutdown, ProgressLines(about), *best]
        super().__init__(
            train_dataset=sequences, eval_dataset=validation, data_collator=collate, callbacks=callbacks, **kwargs
        )
        self.remove_callback(PrinterCallback)
        self.shutdown, self.probe = shutdown, probe
        self.meter = ThroughputMeter(StepFlops(self.model), self.args.world_size)
        self.loss_is_scaled_for_ga = True
        self.recipe, self.method = recipe, method
        self.step_loss: Tensor | float = 0.0

    @cached_property
    def head(self) -> Head | None:
        """The model's head, if its loss can be computed in pieces (grow.model.head)."""
        with not_compiled():
            return known_head(self.model)

    # The loss: the mean over all labels of the global batch, whatever the ranks and the accumulation.

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Returns the micro-batches of a step, and how many labels all ranks have in theirs: []."""
        start = time.monotonic()
        samples = list(itertools.islice(epoch_iterator, num_batches))
        self.meter.waited += time.monotonic() - start
        labels = sum((batch["labels"] != IGNORED).sum() for batch in samples)
        tokens = sum((batch["rows"] >= 0).sum() for batch in samples)
        counts = self.accelerator.reduce(torch.as_tensor([labels, tokens], device=device), "sum")
        self.meter.step(counts)
        # A method may remove labels; without this, a batch that has none left would have a loss of 0/0.
        return samples, counts[0].clamp(min=1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns this micro-batch's share of the mean loss, times world_size, since DeepSpeed averages over ranks; and
        the method's penalty."""
        weights = self.method.token_weights(inputs["rows"][inputs["labels"] != IGNORED])
        loss = head_loss_sum(model, self.head, inputs, weights) / num_items_in_batch * self.accelerator.num_processes
        self.shutdown.check_loss(loss)
        if model.training and type(self.method).rate_factor is not Method.rate_factor:
            self._set_rate(loss.detach())
        return loss + self.method.penalty() / self.args.gradient_accumulation_steps

    def _set_rate(self, loss: Tensor) -> None:
        """Sets the learning rate of a step by its loss, once its last micro-batch has one; `loss` is this one's share.
        The schedule sets it anew after the step."""
        self.step_loss = self.step_loss + loss
        if self.accelerator.sync_gradients:
            factor = self.method.rate_factor(self.accelerator.reduce(self.step_loss, "mean").item())
            self.step_loss = 0.0
            for group in self.optimizer.param_groups:
                group["lr"] *= factor

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: Trainer's estimate walks through all parameters in every step; grow.training.flops is used."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the throughput, and the true epoch: Trainer counts the whole run as one."""
        step, batch = self.state.global_step, self.args.train_batch_size * self.args.gradient_accumulation_steps
        seen = step * batch * self.args.world_size * self.train_dataset.share
        self.state.epoch = seen / len(self.train_dataset.sequences)
        if "loss" in logs:
            logs |= self.meter.take()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Returns the mean loss over the validation rows' labels, and the share of them that are the likeliest
        token."""
        with not_compiled():
            return self._validate(metric_key_prefix)

    def _validate(self, metric_key_prefix: str) -> dict[str, float]:
        start = time.monotonic()
        total = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in self.own_batches(self.eval_dataset):
            with self.compute_loss_context_manager():
                logprobs, hits = head_scores(self.model_wrapped, self.head, batch)
            total += torch.stack([-logprobs.double().sum(), hits.double().sum(), total.new_tensor(len(hits))])
        loss, right, count = self.accelerator.reduce(total, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / count, f"{metric_key_prefix}_accuracy": right / count}
        if self.probe is not None:
            metrics |= self.probe.measure(self)
        self.meter.aside(time.monotonic() - start)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def start_losses(self) -> list[Tensor]:
        """Returns the loss in nats of every label of the training rows that the run comes to, in the model as it is:
        one tensor an example, fp32, as long as its labels; NaN where there is no label, and for all other rows. The
        rows are shared out to the ranks; each has all losses."""
        with not_compiled():
            return self._start_losses()

    def _start_losses(self) -> list[Tensor]:
        sequences = self.train_dataset.sequences
        lengths = sequences.examples.lengths.tolist()
        starts = torch.tensor([0, *lengths], device=self.args.device).cumsum(0)
        losses = torch.zeros(sum(lengths), device=self.args.device)
        counted = torch.zeros_like(losses)
        for batch in self.own_batches(self.train_dataset.seen()):
            with self.compute_loss_context_manager():
                logprobs, _ = head_scores(self.model_wrapped, self.head, batch)
            learnt = batch["labels"] != IGNORED
            places = starts[batch["rows"][learnt]] + batch["position_ids"][learnt]
            losses[places], counted[places] = -logprobs, 1.0
        losses, counted = self.accelerator.reduce(torch.stack([losses, counted]), "sum")
        return list(losses.masked_fill(counted == 0, torch.nan).split(lengths))

    def own_batches(self, sequences: Any) -> Iterator[dict[str, Tensor]]:
        """Yields this rank's share of the sequences, for a forward pass. All ranks have the same number of batches
        (ZeRO-3 gathers weights in each); sequences that fill up the last ones have no labels."""
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        self.model_wrapped.eval()
        for start in range(0, len(sequences), size * world):
            places = [start + rank * size + i for i in range(size)]
            whole = collate([sequences[i % len(sequences)] for i in places])
            batch = {name: tensor.to(self.args.device) for name, tensor in whole.items()}
            for i, place in enumerate(places):
                if place >= len(sequences):
                    batch["labels"][i] = IGNORED
            yield batch


def compare_frozen(model: nn.Module, on_disk: dict[str, Any], read: Any) -> tuple[int, list[str]]:
    """Compares the frozen parameters with the starting checkpoint. Returns how many were compared, and the names of
    those that differ, on any rank, by a bit or more.

    `on_disk` maps a parameter's canonical name to its name in the checkpoint, which `read` reads. Parts of a tower that
    transformers has renamed as it loaded them are not found there, and left out.
    """
    compared, changed = 0, []
    for name, parameter in model.named_parameters():
        own = on_disk.get(canonical(name))
        if parameter.requires_grad or (own is None and not of_language_model(name)):
            continue
        assert own is not None, name
        compared += 1
        with gathered(parameter):
            kept = torch.equal(parameter.detach().cpu(), read(own).to(parameter.dtype))
        verdict = torch.tensor(int(not kept), device=parameter.device)
        if dist.is_initialized():
            dist.all_reduce(verdict)
        if verdict.item():
            changed.append(name)
    return compared, changed
