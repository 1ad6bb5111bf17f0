"""What watches a run from step to step: the system's signals to leave, a loss that has gone, memory, its pace."""

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
    """Makes all ranks leave together, at the end of a step: with a checkpoint when the system asks any of them to go
    (SIGTERM, SIGUSR1), without one when the loss is no number on any of them.

    Signals reach ranks at different steps, and a rank that left alone would leave the others waiting for it: so both
    flags are reduced over all ranks after every step. Made before the model is loaded, so that a signal that comes
    early is not lost, and does not kill.
    """

    def __init__(self) -> None:
        self.asked = False
        self.leaving = False
        self.lost: torch.Tensor | None = None
        self.holes = MallocTrimmer()
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def saw(self, loss: torch.Tensor) -> None:
        """Of every micro-batch; it stays on the device until the step's end."""
        lost = ~torch.isfinite(loss.detach())
        self.lost = lost if self.lost is None else self.lost | lost

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Raises Fault on every rank if the loss of any is NaN or infinite."""
        flags = torch.zeros(2, dtype=torch.int32, device=args.device)
        flags[0] = int(self.asked)
        if self.lost is not None:
            flags[1] = self.lost.to(torch.int32)
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        asked, lost = flags.tolist()
        if lost:
            raise Fault(
                f"step {state.global_step}: the loss is not a number any more; a smaller learning_rate may help "
                "(run the same command again to go on from the last checkpoint)"
            )
        if asked and state.global_step < state.max_steps:
            self.leaving = control.should_save = control.should_training_stop = True
        self.holes.give_back()
        return control


class ThroughputMeter:
    """How fast a run goes, since it was last asked: tokens of text and labels a second over all ranks, and the share of
    the time in which rank 0 waited for data; and of what its devices could do, if that is known (grow.training.flops).
    """

    def __init__(self, flops: StepFlops, devices: int) -> None:
        self.flops, self.devices, self.peak = flops, devices, peak()
        self.counts: torch.Tensor | None = None
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()

    def step(self, counts: torch.Tensor) -> None:
        """Of every step: labels and tokens, [2], which stay on the device until asked for."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.steps += 1

    def aside(self, seconds: float) -> None:
        """Time that was spent on something other than training."""
        self.since += seconds

    def take(self) -> dict[str, float]:
        """The figures, to be logged."""
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
