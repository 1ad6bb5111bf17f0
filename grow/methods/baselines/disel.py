"""DISeL: a LoRA whose rank-one components are let through or held back by gates that read the input."""

from dataclasses import dataclass
from typing import Any, ClassVar

from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.trained_weights import Export
from grow.errors import UserError
from grow.methods.lora import Lora
from grow.model.lora import add_gates


@dataclass
class Disel(Lora):
    """Trains a LoRA with a sigmoid gate for each rank and token, all nearly shut at first, with no loss of their own
    ("Learning When to Adapt", arXiv 2605.19028; grow.model.lora.RankGate). In the run's
    folder result/ the gates lie among the LoRAs, as PEFT has them; PEFT alone would leave them out."""

    switches: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def add_parameters(self, model: Any) -> None:
        """Puts the LoRAs and their gates in."""
        super().add_parameters(model)
        add_gates(model)

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of A, B and the gates."""
        gates = {".lora_gate.weight": (self.lora_rank, in_features), ".lora_gate.bias": (self.lora_rank,)}
        return super().parts(out_features, in_features) | gates

    def export(self, start: Checkpoint, trained: dict[str, LazyTensor], dtype: str) -> Export:
        """Raises UserError: what depends on the input cannot be merged."""
        raise UserError(
            "disel: its gates read the input, so no weights of a stock model can hold it; "
            "give `eval` the run's folder result/, which has LoRAs and gates"
        )
