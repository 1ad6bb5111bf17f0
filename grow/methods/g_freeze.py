"""G-Freeze: only the added copies train; everything that was there before stays as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from grow.methods.method import Method


@dataclass
class GFreeze(Method):
    """Trains `mlp.grown` of the grown layers ("Grow, Don't Overwrite", arXiv 2603.08647). Ends in a growth package."""

    grows: ClassVar[bool] = True

    def trains(self, name: str) -> bool:
        """The added copies."""
        return ".mlp.grown." in name

    def write_result(self, run: Path, out: Path) -> None:
        """The growth package, which `python -m grow attach` puts on the base again."""
        from grow.checkpoint.package import growth

        growth(str(run), str(out))
