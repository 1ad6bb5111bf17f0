"""G-Freeze: only the added copies train; all original weights are frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from grow.checkpoint.package import extract_growth
from grow.methods.kl import KlRegularized
from grow.names import is_copy


@dataclass
class GFreeze(KlRegularized):
    """Trains `mlp.grown` of the grown layers ("Grow, Don't Overwrite", arXiv 2603.08647). The result is a growth
    package."""

    grows: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True
    switches: ClassVar[bool] = True

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to the added copies."""
        return is_copy(name)

    def write_result(self, run: Path, out: Path) -> None:
        """Writes the growth package, which `grow attach` puts on the base again."""
        extract_growth(str(run), str(out), export=lambda _, dtype, start, trained: self.export(start, trained, dtype))
