"""Ranks layers to grow: the best are those whose weights move most in a short pilot run.

"Grow, Don't Overwrite" (arXiv 2603.08647, section on growing fewer layers) ranks layers by the magnitude of their
weight update. Here that is the Frobenius norm of the update of the MLP's three matrices, read from checkpoints a block
of rows at a time; or, without any training, of the gradient at the base (grow.analysis.gradients).
"""

from collections.abc import Sequence
from math import fsum, hypot, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from grow.analysis.figures import markdown, new_figure, write_figure
from grow.checkpoint.files import write_json, write_text
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.updates import read_updates
from grow.errors import UserError
from grow.methods import export_trained

ORDERS = {
    "update": "update of the MLP, Frobenius norm",
    "relative": "update of the MLP, relative to its weights",
    "gradient": "gradient of the MLP at the base, Frobenius norm",
}
COST = (
    "what training layer i of n costs, in forward passes: 1 + (n - i) / n, since a backward pass goes down to layer i"
)

Norms = dict[int, dict[str, tuple[float, float]]]
"""The Frobenius norms of an update (or a gradient) and of the weight, by layer and matrix."""


def update_norms(path: str, start: str = "") -> tuple[Norms, int]:
    """Returns the norms of a run's updates, and how many layers its model has. Raises UserError as read_updates
    does."""
    norms: Norms = {}
    updates, layers = read_updates(path, start, export=export_trained)
    for update in updates:
        sizes = (frobenius(update.change), frobenius(update.before.to("F32")))
        norms.setdefault(update.layer, {})[update.matrix] = sizes
    if not any(size for matrices in norms.values() for size, _ in matrices.values()):
        raise UserError(f"{path}: nothing in it differs from what it started from; a ranking needs a run that trained")
    return norms, layers


def frobenius(tensor: LazyTensor) -> float:
    """Returns ‖tensor‖_F of a tensor in fp32: its squares are summed in fp64, a block of rows at a time."""
    return sqrt(fsum(float(np.square(block, dtype=np.float64).sum()) for block in tensor.blocks()))


def rank(samples: Sequence[Norms], layers: int, by: str = "update", cost: bool = False) -> list[dict[str, Any]]:
    """Returns the layers, the best first: means over the samples (runs, or batches), each with its standard deviation.

    `layers` is how many the model has. `cost` divides a norm by what training that layer costs (COST). Raises UserError
    if the samples are of different layers, or if no MLP trained. Layers of which attention alone trained are left out.
    """
    samples = [{layer: own for layer, own in norms.items() if any(map(_is_mlp, own))} for norms in samples]
    if not all(samples):
        raise UserError("ranking: no matrix of an MLP has trained, and layers are ranked by their MLPs")
    if any(norms.keys() != samples[0].keys() for norms in samples):
        raise UserError("ranking: the runs trained different layers; name runs of the same ones")
    mlps = [{layer: _of_mlp(matrices) for layer, matrices in norms.items()} for norms in samples]
    found = []
    for layer, matrices in samples[0].items():
        sizes = [mlp[layer][0] for mlp in mlps]
        shares = [size / weight for size, weight in (mlp[layer] for mlp in mlps)]
        price = 1 + (layers - layer) / layers if cost else 1.0
        scores = [size / price for size in (shares if by == "relative" else sizes)]
        found.append(
            {"layer": layer, "score": _mean(scores), "norm": _mean(sizes), "relative": _mean(shares)}
            | ({"cost": price} if cost else {})
            | {"matrices": {matrix: _of_matrix([norms[layer][matrix] for norms in samples]) for matrix in matrices}}
        )
    return sorted(found, key=lambda row: -row["score"]["mean"])


def _is_mlp(matrix: str) -> bool:
    return matrix.startswith("mlp.")


def _of_mlp(matrices: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Returns the norms of an MLP's matrices taken together."""
    own = [sizes for matrix, sizes in matrices.items() if _is_mlp(matrix)]
    return hypot(*(size for size, _ in own)), hypot(*(weight for _, weight in own))


def _of_matrix(sizes: list[tuple[float, float]]) -> dict[str, float]:
    """Returns a matrix's norm, and as `relative` the mean of its ratio to the weight's (0 for a weight of zeros)."""
    shares = [size / weight if weight else 0.0 for size, weight in sizes]
    return _mean([size for size, _ in sizes]) | {"relative": fmean(shares)}


def _mean(values: list[float]) -> dict[str, float]:
    return {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else 0.0}


def write_ranking(
    rows: list[dict[str, Any]], out: str, by: str, cost: bool, sources: Sequence[str], samples: str
) -> dict[str, Any]:
    """Writes OUT/ranking.json, which `expand --layers top:6:OUT/ranking.json` reads, ranking.md and ranking.png.

    `samples` says in words what the means are over. Returns what the file holds, and under "text" the table.
    """
    folder = Path(out)
    what = ORDERS[by] + (f", divided by {COST}" if cost else "")
    result = {"layers": [row["layer"] for row in rows], "by": what, "sources": list(sources), "figures": rows}
    text = f"Layers by {what}; {samples}.\n\n" + _table(rows)
    _plot(rows, ORDERS[by] + (" / cost" if cost else ""), folder / "ranking.png")
    write_text(folder / "ranking.md", text)
    write_json(folder / "ranking.json", result)
    return result | {"out": str(folder), "text": text}


def _table(rows: list[dict[str, Any]]) -> str:
    columns = sorted({matrix for row in rows for matrix in row["matrices"]}, key=lambda m: (not _is_mlp(m), m))
    header = ["place", "layer", "score", "MLP", "MLP, relative", *(matrix.split(".", 1)[-1] for matrix in columns)]
    lines = []
    for place, row in enumerate(rows, 1):
        matrices = [_with_share(row["matrices"][name]) if name in row["matrices"] else "–" for name in columns]
        figures = [_cell(row[key]) for key in ("score", "norm", "relative")]
        lines.append([str(place), str(row["layer"]), *figures, *matrices])
    return markdown(header, lines)


def _cell(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.4g}" + (f" ± {figure['spread']:.2g}" if figure["spread"] else "")


def _with_share(figure: dict[str, float]) -> str:
    return f"{_cell(figure)} ({figure['relative']:.2%})"


def _plot(rows: list[dict[str, Any]], label: str, path: Path) -> None:
    figure, axes = new_figure(max(6.0, 0.35 * len(rows)), 3.6)
    axes.bar(
        [row["layer"] for row in rows], [row["score"]["mean"] for row in rows],
        yerr=[row["score"]["spread"] or float("nan") for row in rows], capsize=2,
    )  # fmt: skip
    for place, row in enumerate(rows, 1):
        axes.annotate(str(place), (row["layer"], 0), xytext=(0, 3), textcoords="offset points", ha="center", color="w")
    axes.set(title="Layers, and their places", xlabel="layer", ylabel=label)
    axes.set_xticks(sorted(row["layer"] for row in rows))
    write_figure(path, figure)
