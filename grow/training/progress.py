"""Prints the progress of a run: a line that says what runs, one for each logging interval, and one for each validation.

They are plain lines on a terminal and in a file alike, of rank 0 alone. TensorBoard and trainer_state.json have all
figures.
"""

import time
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLines(TrainerCallback):
    """Prints the lines, in place of transformers' own PrinterCallback and its bars. `about` is the first line."""

    def __init__(self, about: str):
        self.about, self.begun, self.first = about, 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Says what runs, and from where."""
        if state.is_world_process_zero:
            print(self.about + (f"; resumes after step {state.global_step}" if state.global_step else ""), flush=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock at the first step."""
        if not self.begun:
            self.begun, self.first = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Prints the figures of an interval or of a validation; what Trainer logs at the end is neither."""
        kind = next((name for name in ("loss", "eval_loss") if name in logs), None)
        if kind is None or not state.is_world_process_zero:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if kind == "loss":
            passed = (time.monotonic() - self.begun) / max(1, state.global_step - self.first)
            line = step_line(step, logs, passed * (state.max_steps - state.global_step))
        else:
            line = validation_line(step, logs)
        print(line, flush=True)


def step_line(step: str, logs: dict[str, Any], left: float) -> str:
    """Returns the line of the steps since the last one; `left` is the time, in seconds, that the rest of the run will
    take."""
    parts = [
        step,
        f"loss {logs['loss']:.4f}",
        f"lr {logs['learning_rate']:.2e}",
        f"norm {logs['grad_norm']:8.3f}" if "grad_norm" in logs else "",
        f"{logs['tokens_per_second']:9,.0f} tokens/s",
        f"{logs['seconds_per_step']:7.3f} s/step",
        f"MFU {logs['mfu']:5.1%}" if "mfu" in logs else "",
        f"ETA {timedelta(seconds=round(left))}",
    ]
    return "  ".join(part for part in parts if part)


def validation_line(step: str, logs: dict[str, Any]) -> str:
    """Returns the line of a validation. Retention and KL are there where the run probes them (grow.training.probe)."""
    parts = [step, "validation", f"loss {logs['eval_loss']:.4f}", f"accuracy {logs['eval_accuracy']:.1%}"]
    if "retention" in logs:
        parts.append(f"retention {logs['retention']:.3f}")
    if "kl_from_base" in logs:
        parts.append(f"KL from the base {logs['kl_from_base']:.4f}")
    return "  ".join(parts)
