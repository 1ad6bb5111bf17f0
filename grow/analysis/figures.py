"""Tables and pictures of commands that measure."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grow.checkpoint.files import written_whole


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Writes a matplotlib figure as PNG. Raises UserError if the file cannot be written."""
    with written_whole(Path(path)) as partial:
        figure.savefig(partial, dpi=130, format="png")


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Returns a matplotlib figure of a size in inches, drawn without a screen, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)
