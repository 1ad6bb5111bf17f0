"""Callbacks that follow a run from step to step: preemption, a loss that is not finite, memory, throughput."""

import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grow.errors import Fault
from grow.model.memory import MallocTrimmer
from grow.training.flops import StepFlops, peak

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class GracefulShutdown(TrainerCallback):
    """Makes all ranks stop together at the end of a step: with a checkpoint when the system preempts any of them
    (SIGTERM, SIGUSR1), without one when the loss of any is not finite.

    Signals reach ranks at different steps, and a rank that stopped alone would leave the others waiting for it: so both
    flags are reduced over all ranks after every step. It is made before the model is loaded, so that an early signal
    is not lost, and does not kill.
    """

    def __init__(self) -> None:
        self.signalled = False
        self.preempted = False
        self.not_finite: torch.Tensor | bool = False
        self.trimmer = MallocTrimmer()
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.signalled = True

    def check_loss(self, loss: torch.Tensor) -> None:
        """Notes whether a micro-batch's loss is finite; the answer stays on the device until the step's end."""
        self.not_finite = self.not_finite | ~torch.isfinite(loss.detach())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises Fault on every rank if the loss of any is NaN or infinite."""
        flags = torch.zeros(2, dtype=torch.int32, device=args.device)
        flags[0], flags[1] = self.signalled, self.not_finite
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        signalled, not_finite = flags.tolist()
        if not_finite:
            raise Fault(
                f"step {state.global_step}: the loss is not a number any more; a smaller learning_rate may help "
                "(run the same command again to resume from the last checkpoint)"
            )
        if signalled and state.global_step < state.max_steps:
            self.preempted = control.should_save = control.should_training_stop = True
        self.trimmer.trim()


class ThroughputMeter:
    """Measures a run's throughput between two calls of `take`: tokens of text and labels a second over all ranks, the
    share of the time in which rank 0 waited for data, and model FLOPs utilisation where the device's peak is known
    (grow.training.flops)."""

    def __init__(self, flops: StepFlops, devices: int) -> None:
        self.flops, self.devices, self.peak = flops, devices, peak()
        self.counts: torch.Tensor | None = None
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()

    def step(self, counts: torch.Tensor) -> None:
        """Counts a step: its labels and tokens, [2], which stay on the device until `take`."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.steps += 1

    def aside(self, seconds: float) -> None:
        """Leaves out seconds that were spent on something other than training."""
        self.since += seconds

    def take(self) -> dict[str, float]:
        """Returns the figures since the last call, to be logged, and starts anew."""
        labels, tokens = (0, 0) if self.counts is None else self.counts.tolist()
        now = time.monotonic()
        passed = now - self.since
        found = {
            "tokens_per_second": round(tokens / passed, 1),
            "labels_per_second": round(labels / passed, 1),
            "seconds_per_step": round(passed / max(1, self.steps), 4),
            "data_share": round(self.waited / passed, 4),
        }
        if self.peak:
            found["mfu"] = round(self.flops.of(tokens, labels) / passed / (self.peak * self.devices), 4)
        self.counts, self.steps, self.waited, self.since = None, 0, 0.0, now
        return found
