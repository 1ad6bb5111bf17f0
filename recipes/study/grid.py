"""The grid of a study: its cells, each one training run.

A grid is a YAML file such as translation.yaml: a recipe and its fields, what is scored, and at which α. Under `methods`
it has rows, LABEL: {method: …, learning_rate: [a list]} and, where they are needed, `layers`, `factor`, `attention` (a
kind, or a kind and layers) and `copies_from` (a cell that was run with `--keep`, whose MLPs are copied in place of the
base's) of a method that grows; `fields` of the recipe; `average`, how many of the last checkpoints are scored as one;
`learn_alphas`, the arguments of that command; `lines`, LiNeS's λ (lines.py), of a method that does not grow;
`switches`, the kinds of switch with which it is scored besides, the first while it trains; `two_models`, a cell with a
switch, whose decisions choose between this row's whole model and the base; `write`, the seeds for which what the model
writes is scored, which takes longest ([] for none; all, unless it is given). `shots` has written answers to the
retention questions scored (written.py). A cell is a row at one rate with one seed. Results are identified by its name
alone, so a row that is changed needs another label.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grow.errors import UserError, unknown
from grow.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Describes one training run of a grid. `layers` is empty for methods that do not grow, "none" where `attention`
    grows alone; `copies_from` is the cell whose MLPs are copied, if not the base's; `fields` are the recipe's;
    `average` is how many of the last checkpoints are scored as one; `learn_alphas` has the arguments of that command,
    if each layer gets an α of its own, and `lines` LiNeS's λ, if updates are scaled with depth; `switches` are kinds of
    switch, and `two_models` is the cell that decides between whole models."""

    label: str
    method: str
    layers: str = ""
    attention: str = ""
    copies_from: str = ""
    factor: int = 2
    fields: dict[str, Any] = field(default_factory=dict)
    average: int = 1
    learn_alphas: dict[str, Any] = field(default_factory=dict)
    lines: float | None = None
    switches: list[str] = field(default_factory=list)
    two_models: str = ""
    write: bool = True
    learning_rate: float
    seed: int

    @property
    def merges(self) -> bool:
        """Says whether what is trained can be merged into weights; DISeL's gates read the input."""
        return self.method != "disel"

    @property
    def is_between(self) -> bool:
        """Says whether there is something between the base and the result; a deeper model is of other shapes."""
        return self.method != "blocks"

    @property
    def is_ranked(self) -> bool:
        """Says whether its layers are ranked, by how far their MLPs moved."""
        return self.merges and self.is_between and self.layers != "none"

    @property
    def name(self) -> str:
        """Returns the name of the cell, as `--only` takes it."""
        return f"{self.label} {self.learning_rate:g} seed {self.seed}"


_NEEDED = ("recipe", "fields", "alphas", "limit", "retention_limit", "seeds", "methods")
_ROW = (
    "method",
    "layers",
    "attention",
    "copies_from",
    "factor",
    "learning_rate",
    "fields",
    "average",
    "learn_alphas",
    "lines",
    "switches",
    "two_models",
    "write",
)


def read_grid(path: Path) -> dict[str, Any]:
    """Reads and checks a grid. Raises UserError, one line, if it is not a grid or has a row that makes no sense."""
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no grid there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    for key in _NEEDED:
        if not isinstance(grid, dict) or key not in grid:
            raise UserError(f"{path}: is not a grid: it does not say {key}")
    for key in grid:
        if key not in (*_NEEDED, "general_text", "effective_rank", "shots"):
            raise UserError(f"{path}: {unknown(key, _NEEDED, 'part of a grid')}")
    for label, row in grid["methods"].items():
        if "layer_dial" in row:
            print(f"{path}: {label}: layer_dial is called learn_alphas now", file=sys.stderr)
            row["learn_alphas"] = row.pop("layer_dial")
        _check(label, row)
    return dict(grid)


def cells(grid: dict[str, Any], seeds: list[int]) -> Iterator[Cell]:
    """Yields all cells of a grid, one seed after the other."""
    for seed in seeds:
        for label, row in grid["methods"].items():
            for rate in row["learning_rate"]:
                own = {"label": label, "layers": str(row.get("layers", "")), "learning_rate": float(rate), "seed": seed}
                yield Cell(**(row | own | {"write": seed in row.get("write", seeds)}))


def _check(label: str, row: dict[str, Any]) -> None:
    for key in row:
        if key not in _ROW:
            raise UserError(f"{label}: {unknown(key, _ROW, 'part of a row')}")
    if not isinstance(row.get("learning_rate"), list):
        raise UserError(f"{label}: learning_rate is a list of rates")
    if not isinstance(row.get("write", []), list):
        raise UserError(f"{label}: write is a list of seeds ([] for none)")
    if row.get("method") not in METHODS or row["method"] == "adapter":
        raise UserError(
            f"{label}: method {row.get('method')!r}: unknown, or one that does not end in a checkpoint to be scored"
        )
    if METHODS[row["method"]].grows != ("layers" in row):
        raise UserError(f"{label}: layers (all, or 0-5) say which grow, of a method that grows and of no other")
