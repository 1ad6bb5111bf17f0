"""LoRA: a low-rank update beside each linear layer."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from grow.checkpoint.lazy import LazyTensor, elementwise
from grow.errors import UserError
from grow.methods.kl import KlRegularized
from grow.methods.peft_method import PeftMethod


@dataclass
class Lora(KlRegularized, PeftMethod):
    """Trains W + (lora_alpha / lora_rank) · B A for every linear layer, with A [rank, in] random and B [out, rank] zero
    at first (Hu et al. 2021, arXiv 2106.09685); as PEFT does it. KL regularisation can be added."""

    keeps_base: ClassVar[bool] = True
    part: ClassVar[str] = ".lora_"

    lora_rank: int = 16
    lora_alpha: int = 32

    def check(self, recipe: Any) -> None:
        """Raises UserError also for an invalid rank."""
        super().check(recipe)
        if self.lora_rank < 1:
            raise UserError("lora_rank must be at least 1")

    def config(self, target_modules: list[str]) -> Any:
        """Returns PEFT's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_rank, lora_alpha=self.lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM"
        )

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
