"""The effective rank of a weight update, the number of its directions, compared with that of noise.

The figures of each update, with its singular values σ_1 ≥ σ_2 ≥ …:
- effective rank: exp(H(p)) with p_i = σ_i / Σσ and H Shannon's entropy in nats (Roy & Vetterli 2007, "The effective
  rank: a measure of effective dimensionality", definition 1);
- stable rank: ‖·‖_F² / ‖·‖_2² = Σσ² / σ_1²;
- the number of the largest that hold 90 % and 99 % of the energy Σσ².

The noise floor is twofold. A random Gaussian matrix of the same shape and Frobenius norm (none of the figures depends
on the norm) says what an update without any structure has. And storing a weight w in bf16 moves it by up to half a unit
in the last place: as noise spread evenly over a unit, ulp(w)² / 12 of energy each. A matrix of independent noise of
variance s² has its largest singular value near s(√m + √n) (Marchenko & Pastur 1967), so only singular values above that
can be told from rounding, once the weights are rounded.
"""

from functools import cache
from math import exp, fsum, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from grow.analysis.figures import markdown, new_figure, write_figure
from grow.checkpoint.dtypes import Rows
from grow.checkpoint.files import write_json, write_text
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.updates import Update, read_updates
from grow.errors import UserError
from grow.methods import export_trained

_MANTISSA = 7
"""Bits of bf16 after the point."""


def effective_ranks(path: str, start: str = "", tag: str = "") -> list[dict[str, Any]]:
    """Returns the figures of every update of a run (grow.checkpoint.updates), with one matrix in memory at a time.

    Raises UserError as read_updates does, and if nothing has changed.
    """
    updates, _ = read_updates(path, start, tag, export_trained)
    found = [figures for figures in map(_measure, updates) if figures]
    if not found:
        raise UserError(f"{path}: nothing in it differs from what it started from; a run that trained is needed")
    return found


def _measure(update: Update) -> dict[str, Any] | None:
    change = update.change
    values = singular_values(change.rows(0, change.length))
    if not values[0]:
        return None
    shape = (change.shape[0], change.shape[1])
    rounding = rounding_norm(update.after)
    edge = rounding / sqrt(shape[0] * shape[1]) * (sqrt(shape[0]) + sqrt(shape[1]))
    norm = float(np.sqrt(np.square(values).sum()))
    return {
        "layer": update.layer,
        "matrix": update.matrix,
        "shape": list(shape),
        "norm": norm,
        **spectrum(values),
        "random": _random(*sorted(shape)),
        "rounding": {"norm": rounding, "ratio": norm / rounding, "above": int((values > edge).sum())},
    }


def singular_values(matrix: Rows) -> Rows:
    """Returns the singular values of a matrix [m, n] in fp32, the largest first, in fp64: the square roots of the
    eigenvalues of the smaller Gram matrix, formed in fp64. Those below 1e-8 of the largest are lost, which changes none
    of the figures."""
    wide = matrix.astype(np.float64) if matrix.shape[0] <= matrix.shape[1] else matrix.T.astype(np.float64)
    return np.sqrt(np.linalg.eigvalsh(wide @ wide.T).clip(min=0))[::-1]


def spectrum(values: Rows) -> dict[str, float]:
    """Returns the figures of singular values, given the largest first; at least one must not be zero."""
    energy = np.square(values)
    shares = values[values > 0] / values.sum()
    held = np.cumsum(energy) / energy.sum()
    return {
        "effective_rank": exp(-float((shares * np.log(shares)).sum())),
        "stable_rank": float(energy.sum() / energy[0]),
        "values_90": int((held < 0.9).sum()) + 1,
        "values_99": int((held < 0.99).sum()) + 1,
    }


@cache
def _random(rows: int, columns: int) -> dict[str, float]:
    matrix = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    return spectrum(singular_values(matrix))


def rounding_norm(weight: LazyTensor) -> float:
    """Returns the Frobenius norm by which rounding to bf16 is expected to move a weight."""
    energy = []
    for block in weight.to("F32").blocks():
        _, exponents = np.frexp(block)  # |w| in [2^(e-1), 2^e): its unit in the last place is 2^(e-1-7)
        ulp = np.ldexp(np.where(block == 0, 0.0, 1.0), exponents - 1 - _MANTISSA)
        energy.append(float(np.square(ulp).sum()) / 12)
    return sqrt(fsum(energy))


def write_ranks(found: list[dict[str, Any]], out: str, source: str) -> dict[str, Any]:
    """Writes OUT/effective_rank.json, .md and .png. Returns what the JSON holds, and under "text" a summary."""
    folder = Path(out)
    result: dict[str, Any] = {"source": source, "updates": found}
    summary = rank_table(found)
    draw_ranks(found, folder / "effective_rank.png")
    write_text(folder / "effective_rank.md", f"Weight updates of {source}.\n\n{summary}\n{_table(found)}")
    write_json(folder / "effective_rank.json", result)
    return result | {"out": str(folder), "text": summary}


def rank_table(found: list[dict[str, Any]]) -> str:
    """Returns a Markdown table that sums up each matrix over the layers."""
    header = [
        "matrix", "effective rank: median", "lowest", "highest", "of a random matrix", "stable rank: median",
        "of a random matrix", "update / bf16 rounding: median",
    ]  # fmt: skip
    rows = []
    for matrix in _matrices(found):
        own = [f for f in found if f["matrix"] == matrix]
        ranks = [f["effective_rank"] for f in own]
        cells = [float(np.median(ranks)), min(ranks), max(ranks), own[0]["random"]["effective_rank"]]
        cells += [float(np.median([f["stable_rank"] for f in own])), own[0]["random"]["stable_rank"]]
        cells += [float(np.median([f["rounding"]["ratio"] for f in own]))]
        rows.append([matrix, *(f"{cell:.3g}" for cell in cells)])
    return markdown(header, rows)


def _table(found: list[dict[str, Any]]) -> str:
    header = [
        "layer", "matrix", "norm", "effective rank", "of random", "stable rank", "90 % energy", "99 % energy",
        "norm / rounding's", "above rounding",
    ]  # fmt: skip
    rows = []
    for f in found:
        share, noise = f["effective_rank"] / f["random"]["effective_rank"], f["rounding"]
        figures = [f"{f['norm']:.3g}", f"{f['effective_rank']:.1f}", f"{share:.1%}", f"{f['stable_rank']:.2f}"]
        counts = [str(f["values_90"]), str(f["values_99"]), f"{noise['ratio']:.2f}", str(noise["above"])]
        rows.append([str(f["layer"]), f["matrix"], *figures, *counts])
    return markdown(header, rows)


def _matrices(found: list[dict[str, Any]]) -> list[str]:
    return sorted({f["matrix"] for f in found})


def draw_ranks(found: list[dict[str, Any]], path: Path) -> None:
    """Draws a heat map of layers × matrices."""
    matrices, layers = _matrices(found), sorted({f["layer"] for f in found})
    share = np.full((len(layers), len(matrices)), np.nan)
    figure, axes = new_figure(2.2 + 0.75 * len(matrices), 1.6 + 0.28 * len(layers))
    for f in found:
        place = layers.index(f["layer"]), matrices.index(f["matrix"])
        share[place] = f["effective_rank"] / f["random"]["effective_rank"]
        axes.annotate(
            f"{f['effective_rank']:.0f}", place[::-1], ha="center", va="center", fontsize=7,
            color="white" if share[place] < 0.6 else "black",
        )  # fmt: skip
    image = axes.imshow(share, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(title="Effective rank of the weight updates", ylabel="layer")
    axes.set_xticks(range(len(matrices)), [m.split(".", 1)[-1] for m in matrices], rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    figure.colorbar(image, label="share of a random matrix's")
    write_figure(path, figure)
