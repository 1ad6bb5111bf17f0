"""G-Freeze: only the added copies train; everything that was there before stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from grow.methods.held import Held

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class GFreeze(Held):
    """Trains `mlp.grown` of the grown layers ("Grow, Don't Overwrite", arXiv 2603.08647). Ends in a growth package."""

    grows: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True

    def trains(self, name: str) -> bool:
        """The added copies."""
        return ".mlp.grown." in name

    def write_result(self, run: Path, out: Path) -> None:
        """The growth package, which `python -m grow attach` puts on the base again."""
        from grow.checkpoint.package import growth

        growth(str(run), str(out))
