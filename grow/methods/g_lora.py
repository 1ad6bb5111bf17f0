"""G-LoRA: the added copies get a low-rank update; all original weights are frozen."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from grow.errors import UserError
from grow.methods.g_freeze import GFreeze
from grow.methods.lora import Lora
from grow.names import check_matrices, is_copy, matrix_of, own_name
from grow.parts import MLPS, growing
from grow.parts.part import Part


@dataclass
class GLora(Lora, GFreeze):
    """Trains as G-Freeze does, but with a low-rank update of the copies: a LoRA in each of their projections,
    merged into them when training has ended. The result is the same growth package, and the optimizer is as small as a
    LoRA's."""

    def __post_init__(self) -> None:
        """Growth is of MLPs, as far as nothing else is known."""
        self._growing: list[Part] = [MLPS]

    def check(self, recipe: Any) -> None:
        """Raises UserError as LoRA does; remembers of what copies will be made."""
        super().check(recipe)
        if self.grown_matrices:
            raise UserError("grown_matrices: g_lora has its LoRAs in lora_targets")
        self._growing = growing(recipe.growth)
        whole = [part for part in self._growing if part.made_of == "matrix"]
        if whole:
            raise UserError(f"g_lora: has no LoRA for a copy of the {whole[0].name}; take g_freeze, or leave it out")

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a matrix that has not grown."""
        super().check_names(names)
        whole = next((name for name in names if is_copy(name) and matrix_of(name) == "grown"), "")
        if whole:
            raise UserError(f"g_lora: has no LoRA for {whole}; take g_freeze, or growth without it")
        grown = [own_name(name) for name in names if is_copy(name)]
        prefixes = tuple(f"{prefix}." for part in self._growing for prefix in part.prefixes(names).values())
        will = [name for name in names if name.startswith(prefixes)]
        check_matrices("lora_targets", self.lora_targets, grown or will)

    def targets(self, name: str) -> bool:
        """Says whether a layer is a projection of the copies, and a chosen one."""
        return is_copy(name) and self.named(name)

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to a LoRA."""
        return self.part in name
