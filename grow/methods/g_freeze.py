"""G-Freeze: only the added copies train; all original weights are frozen."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from grow.checkpoint.package import extract_growth
from grow.errors import UserError
from grow.methods.kl import KlRegularized
from grow.names import check_matrices, is_copy, is_growth, matrix_of, own_name
from grow.parts import growing


@dataclass
class GFreeze(KlRegularized):
    """Trains `mlp.grown` of the grown layers ("Grow, Don't Overwrite", arXiv 2603.08647), or of the copies some
    matrices alone, `grown_matrices`, such as gate_proj and up_proj (arXiv 2510.08564). The result is a growth
    package."""

    grows: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = True
    switches: ClassVar[bool] = True

    grown_matrices: list[str] = field(default_factory=list)

    def check(self, recipe: Any) -> None:
        """Raises UserError for `grown_matrices` where nothing that grows has matrices to choose among."""
        super().check(recipe)
        if self.grown_matrices and all(part.made_of == "matrix" for part in growing(recipe.growth)):
            raise UserError("grown_matrices: what grows is one matrix; leave it out")

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a matrix that the model does not have, or that has not grown."""
        super().check_names(names)
        copied = [own_name(name) for name in names if is_copy(name)]
        check_matrices("grown_matrices", self.grown_matrices, copied or names)

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to the added copies, and to a chosen matrix of theirs."""
        return is_copy(name) and self.chosen(name)

    def chosen(self, name: str) -> bool:
        """Says whether a parameter that growth has added is of `grown_matrices`, or has no matrices to choose among."""
        matrix = matrix_of(name)
        return is_growth(name) and (not self.grown_matrices or matrix == "grown" or matrix in self.grown_matrices)

    def write_result(self, run: Path, out: Path) -> None:
        """Writes the growth package, which `grow attach` puts on the base again."""
        extract_growth(str(run), str(out), export=lambda _, dtype, start, trained: self.export(start, trained, dtype))
