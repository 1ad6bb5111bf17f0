"""What commands that measure leave in their folder: tables, JSON, pictures; each written whole or not at all."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grow.errors import UserError


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file, and its folder if there is none. Raises UserError if that cannot be."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Likewise, of JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Likewise, a matplotlib figure as PNG; it is closed."""
    from matplotlib import pyplot

    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)
    pyplot.close(figure)


def new_figure(*size: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of some inches, drawn without a screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size, layout="constrained")
