"""Plain fine-tuning: every parameter of the language model trains. It is the baseline that forgets."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grow.methods.kl import KlRegularized
from grow.model.mlp import gated_mlps
from grow.names import canonical
from grow.plan import parse_layers

_ANY = 10**6


@dataclass
class Sft(KlRegularized):
    """Trains everything, or the MLPs of some layers alone: `mlp_layers`, written as for `expand --layers`.

    KL regularisation can be added.
    """

    mlp_layers: str = ""

    def prepare(self, model: Any) -> None:
        """Raises UserError also for a layer that the model does not have."""
        if self.mlp_layers:
            parse_layers(self.mlp_layers, len(gated_mlps(model)))
        super().prepare(model)

    def trains(self, name: str) -> bool:
        """Says whether a parameter trains: every one, or those of the chosen MLPs."""
        if not self.mlp_layers:
            return super().trains(name)
        mlp = re.match(r"layers\.(\d+)\.mlp\.", canonical(name))
        return mlp is not None and (self.mlp_layers == "all" or int(mlp[1]) in self._layers)

    @cached_property
    def _layers(self) -> tuple[int, ...]:
        return parse_layers(self.mlp_layers, _ANY)
