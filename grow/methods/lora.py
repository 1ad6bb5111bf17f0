"""LoRA: a low-rank update beside each linear layer."""

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from grow.checkpoint.lazy import LazyTensor, concat_columns, concat_rows, elementwise
from grow.errors import UserError
from grow.methods.kl import KlRegularized
from grow.methods.peft_method import PeftMethod
from grow.names import check_matrices, layer_of
from grow.plan import parse_layers


@dataclass
class Lora(KlRegularized, PeftMethod):
    """Trains W + (lora_alpha / lora_rank) · B A for every linear layer, with A [rank, in] random and B [out, rank] zero
    at first (Hu et al. 2021, arXiv 2106.09685); as PEFT does it. `lora_layers` are the decoder layers whose linear
    layers have one, as `layers` for growth; `lora_targets` the names of these, such as gate_proj and up_proj. KL
    regularisation can be added."""

    keeps_base: ClassVar[bool] = True
    switches: ClassVar[bool] = True
    part: ClassVar[str] = ".lora_"

    lora_rank: int = 16
    lora_alpha: int = 32
    lora_layers: str = "all"
    lora_targets: list[str] = field(default_factory=list)

    def check(self, recipe: Any) -> None:
        """Raises UserError also for an invalid rank."""
        super().check(recipe)
        if self.lora_rank < 1:
            raise UserError("lora_rank must be at least 1")

    def add_parameters(self, model: Any) -> None:
        """Puts the LoRAs in."""
        self._choose(name for name, _ in model.named_parameters())
        super().add_parameters(model)

    def added_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the LoRAs of the chosen layers."""
        self._choose(shapes)
        return super().added_shapes(shapes)

    def _choose(self, names: Iterable[str]) -> None:
        count = 1 + max((layer for layer in map(layer_of, names) if layer is not None), default=-1)
        self._layers = parse_layers(self.lora_layers, count)

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a layer or a matrix that the model does not have."""
        self._choose(names)
        check_matrices("lora_targets", self.lora_targets, names)

    def targets(self, name: str) -> bool:
        """Says whether a linear layer, by its name or its weight's, is a chosen one in a chosen decoder layer."""
        return layer_of(name) in self._layers and self.named(name)

    def named(self, name: str) -> bool:
        """Says whether a linear layer is among `lora_targets`, by its name or its weight's."""
        return not self.lora_targets or name.removesuffix(".weight").rpartition(".")[2] in self.lora_targets

    def config(self, target_modules: list[str], count: int = 1) -> Any:
        """Returns PEFT's LoraConfig, of `count` ranks of a LoRA side by side."""
        from peft import LoraConfig

        return LoraConfig(
            r=count * self.lora_rank, lora_alpha=count * self.lora_alpha, target_modules=target_modules,
            task_type="CAUSAL_LM",
        )  # fmt: skip

    def mean(self, parts: list[dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
        """Returns a LoRA of n times the rank: 1/n Σ Bᵢ Aᵢ = [B₁/n … Bₙ/n] [A₁; …; Aₙ]. The mean of the factors would be
        another update."""
        if len(parts) == 1:
            return parts[0]
        down, up = "lora_A.weight", "lora_B.weight"
        shares = [own[up].scaled(1 / len(parts)) for own in parts]
        return {down: concat_rows(*(own[down] for own in parts)), up: concat_columns(*shares)}

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of A and B."""
        rank = self.lora_rank
        return {".lora_A.weight": (rank, in_features), ".lora_B.weight": (out_features, rank)}

    def merged(self, own: LazyTensor, parts: dict[str, LazyTensor], dtype: str) -> LazyTensor:
        """Returns W + scaling · B A."""
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        scaling = self.lora_alpha / self.lora_rank
        update = LazyTensor(
            own.shape, "F32", lambda begin, end: up.rows(begin, end) @ down.rows(0, down.length) * scaling
        )
        return elementwise(operator.add, "F32", own, update)
