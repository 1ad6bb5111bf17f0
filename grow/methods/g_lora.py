"""G-LoRA: the added copies get a low-rank update; all original weights are frozen."""

from collections.abc import Collection
from dataclasses import dataclass

from grow.methods.g_freeze import GFreeze
from grow.methods.lora import Lora
from grow.names import check_matrices, is_copy, own_name


@dataclass
class GLora(Lora, GFreeze):
    """Trains as G-Freeze does, but with a low-rank update of the copies: a LoRA in each of their projections,
    merged into them when training has ended. The result is the same growth package, and the optimizer is as small as a
    LoRA's."""

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a matrix that has not grown."""
        super().check_names(names)
        grown = [own_name(name) for name in names if is_copy(name)]
        may = [name for name in names if ".mlp." in name or ".self_attn." in name]  # before it has grown
        check_matrices("lora_targets", self.lora_targets, grown or may)

    def targets(self, name: str) -> bool:
        """Says whether a layer is a projection of the copies, and a chosen one."""
        return is_copy(name) and self.named(name)

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to a LoRA."""
        return self.part in name
