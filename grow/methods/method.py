"""The interface of a training method. Everything else in a run is the same for every method."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.trained_weights import Export
from grow.errors import UserError
from grow.names import of_language_model


@dataclass
class Method:
    """Trains the whole language model; other methods override what they do differently.

    A method's dataclass fields are fields of the recipe, by the same names and with the same defaults. `grows` says
    that it starts from a grown checkpoint, not from a base; `keeps_base` that its base stays inside, where
    grow.model.alpha.base_inside finds it; `switches` that a switch (grow.model.switch) can turn what it trains off;
    `stages` are the ZeRO stages that it works with; `compiles` says that its layers are alike enough to be compiled,
    `averages` that what it trains can be averaged over checkpoints.
    """

    grows: ClassVar[bool] = False
    keeps_base: ClassVar[bool] = False
    switches: ClassVar[bool] = False
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    compiles: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    made: ClassVar[Any] = None

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Makes the method with its fields taken from a larger set of them, such as a run.json's recipe."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})

    def check(self, recipe: Any) -> None:
        """Raises UserError for a recipe that the method cannot follow, before anything heavy is loaded."""
        stage = recipe.zero.get("stage", 0)
        if stage not in self.stages:
            raise UserError(
                f"{recipe.deepspeed}: {recipe.method} does not work with ZeRO-{stage}; "
                f"give --deepspeed a config of stage {' or '.join(map(str, self.stages))}"
            )
        if recipe.mix and type(self).token_weights is not Method.token_weights:
            raise UserError(f"mix: {recipe.method} weighs the rows of one data set; take mix out, or another method")
        if recipe.average > 1 and not self.averages:
            raise UserError(f"average: of checkpoints by {recipe.method} there is no mean; leave it out")
        if recipe.switch and not self.switches:
            raise UserError(
                f"switch: {recipe.method} leaves no base that what it trains could be off for; "
                "--method g_freeze does, or take switch out"
            )

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a part of the model that the recipe names and that is not among these tensors."""

    def texts_read(self, recipe: Any) -> list[str]:
        """Names folders, beside the data, whose rows affect the result."""
        return []

    def make(self, recipe: Any) -> Any:
        """Returns what a run needs made before its model is loaded, as JSON. It is made on rank 0, once, when the run
        first begins; every rank has it as `made`, also in a run that resumes."""
        return None

    # What is added.

    def add_parameters(self, model: Any) -> None:
        """Adds parameters to a model that has just been loaded, in place.

        Under ZeRO-3 the model's own are partitioned already (grow.model.gather.gathered gathers them); the added ones
        need not be: DeepSpeed partitions them when training begins.
        """

    def added_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what `add_parameters` adds, by name, to a model with parameters of these shapes."""
        return {}

    def extra_bytes(self, shapes: dict[str, tuple[int, ...]], width: int) -> int:
        """Counts the bytes on every rank that ZeRO does not know of, such as a second model's.

        The model's parameters have these shapes and `width` bytes a value.
        """
        return 0

    # What trains.

    def trains(self, name: str) -> bool:
        """Says whether a parameter trains, by its name in memory."""
        return of_language_model(name)

    def prepare(self, model: nn.Module) -> None:
        """Adds parameters, and freezes what does not train before DeepSpeed sees the model.

        Raises UserError as check_names does.
        """
        self.check_names([name for name, _ in model.named_parameters()])
        self.add_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))

    # What is added to the loss.

    def begin(self, trainer: Any) -> None:
        """Measures the model before it trains, if the method needs that.

        Every rank calls it, with DeepSpeed in place and, in a run that resumes, before what was trained so far is
        loaded (grow.training.trainer.GrowTrainer).
        """

    def token_weights(self, rows: Tensor) -> Tensor | None:
        """Returns a weight [N] for each label's loss: rows [N] int64, the example of each label. None weights all of
        them by 1."""
        return None

    def penalty(self) -> Tensor | float:
        """Returns what is added to the mean loss of every step, in nats: []."""
        return 0.0

    # At which rate.

    def rate_factor(self, loss: float) -> float:
        """Returns what a step's learning rate is multiplied by, given the mean loss of its labels, in nats, without
        `penalty`."""
        return 1.0

    # What is exported.

    def export(self, start: Checkpoint, trained: dict[str, LazyTensor], dtype: str) -> Export:
        """Turns what trained (fp32 master weights, by names in memory) into tensors of a checkpoint.

        They are tensors that the start has, or that growth adds; with a config of its own an export may bring others.
        `dtype` is the one that the run computed in. Raises UserError if the method cannot be exported.
        """
        return Export(trained)

    def write_result(self, run: Path, out: Path) -> None:
        """Writes, on rank 0, the result of a finished run beside its last checkpoint. Plain training has no more."""
