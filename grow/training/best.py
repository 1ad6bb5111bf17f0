"""The checkpoint with the lowest validation loss: it is kept, and a run that gets no lower may end early."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from grow.checkpoint.run_folder import best_step, losses_of


class BestCheckpoint(EarlyStoppingCallback):
    """Writes a checkpoint whenever a validation loss is the lowest so far (`keep_best`), and ends the run, with a
    checkpoint, after `patience` validations in a row that are not; 0 never ends it.

    A run that resumes goes on counting.
    """

    def __init__(self, keep_best: bool, patience: int):
        super().__init__(early_stopping_patience=patience or 10**9)
        self.keep_best = keep_best

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Counts the validations since the lowest loss in a run that resumes. One that had ended, but for its mark,
        ends after a step, of which nothing is kept."""
        losses = losses_of(state.log_history)
        best = best_step(losses)
        self.early_stopping_patience_counter = len({step for step, _ in losses if step > best > 0})
        if best and state.best_metric is None:  # not asked for until now
            state.best_metric = dict(losses)[best]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **more: Any
    ) -> None:
        """Notes a validation, which stands in the history already."""
        losses = losses_of(state.log_history)
        if not state.global_step:
            return
        super().on_evaluate(args, state, control, metrics, **more)
        if control.should_training_stop or (self.keep_best and best_step(losses) == state.global_step):
            control.should_save = True
