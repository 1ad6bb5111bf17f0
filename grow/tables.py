"""What commands that measure leave in their folder: tables, JSON, pictures; each written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grow.errors import UserError


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file, and its folder if there is none. Raises UserError if that cannot be."""
    with _whole(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Likewise, of JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Likewise, a matplotlib figure as PNG; it is closed."""
    from matplotlib import pyplot

    with _whole(Path(path)) as partial:
        figure.savefig(partial, dpi=130, format="png")
    pyplot.close(figure)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` at the end."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def new_figure(*size: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of some inches, drawn without a screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size, layout="constrained")
