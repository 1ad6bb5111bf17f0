"""Plain fine-tuning: every parameter of the language model trains. It is the baseline that forgets."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from grow.methods.kl import KlRegularized
from grow.names import check_matrices, layer_of, matrix_of, mlp_prefixes
from grow.plan import parse_layers

_ANY = 10**6


@dataclass
class Sft(KlRegularized):
    """Trains everything; or the MLPs of some layers alone, `mlp_layers`, written as for `expand --layers`; or the
    matrices of some names alone, `sft_matrices`, such as gate_proj and up_proj (arXiv 2510.08564); or what is both.

    KL regularisation can be added.
    """

    mlp_layers: str = ""
    sft_matrices: list[str] = field(default_factory=list)

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a layer or a matrix that the model does not have."""
        if self.mlp_layers:
            parse_layers(self.mlp_layers, len(mlp_prefixes(names)))
        check_matrices("sft_matrices", self.sft_matrices, names)

    def trains(self, name: str) -> bool:
        """Says whether a parameter trains: every one, or those that are chosen."""
        if not super().trains(name) or (self.sft_matrices and matrix_of(name) not in self.sft_matrices):
            return False
        layer = layer_of(name) if ".mlp." in name else None
        if not self.mlp_layers:
            return True
        return layer is not None and (self.mlp_layers == "all" or layer in self._layers)

    @cached_property
    def _layers(self) -> tuple[int, ...]:
        return parse_layers(self.mlp_layers, _ANY)
