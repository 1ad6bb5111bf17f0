"""Runs and scores in one table (Markdown) and one picture (PNG)."""

from pathlib import Path
from typing import Any

from grow.analysis.figures import new_figure, write_figure
from grow.checkpoint.files import write_text
from grow.checkpoint.run_folder import last_checkpoint, validation_losses
from grow.checkpoint.shards import read_json
from grow.errors import UserError

COLUMNS = (
    ("task loss", "task", "loss", "{:.3f}"),
    ("token accuracy", "task", "token_accuracy", "{:.1%}"),
    ("retention, exact", "retention", "exact_match", "{:.1%}"),
    ("retention, log-likelihood", "retention", "log_likelihood", "{:.2f}"),
)
METRICS = (
    ("accuracy", "task", "accuracy", "{:.1%}"),
    ("chrF", "task", "chrf", "{:.1f}"),
    ("BLEU", "task", "bleu", "{:.1f}"),
    ("KL from the base", "retention", "kl", "{:.4f}"),
    ("identical to the base", "retention", "identical", "{identical_rows:,} of {rows:,} rows"),
)
"""The columns that a table has only if a recipe asked for them, or if the base was known."""


def report(sources: tuple[str, ...], out: str) -> dict[str, Any]:
    """Writes OUT/report.md and OUT/report.png from runs (their curves) and files that `eval --out` wrote (scores)."""
    scores: list[dict[str, Any]] = []
    runs: dict[Path, str] = {}
    for source in sources:
        path = Path(source)
        if (path / "run.json").exists():
            runs[path] = str(read_json(path / "run.json")["recipe"]["method"])
        elif path.is_file():
            scores += _points(read_json(path))
            if not all("task" in point for point in scores):
                raise UserError(f"{path}: not a file that `grow eval --recipe … --out` wrote")
        else:
            raise UserError(f"{path}: neither a training run nor a file that `grow eval --out` wrote")
    methods = list(runs.values())
    curves = {
        method if methods.count(method) == 1 else str(path): validation_losses(last_checkpoint(path))
        for path, method in runs.items()
    }
    folder = Path(out)
    text = table(scores) + "\n" + samples(scores)
    write_text(folder / "report.md", text)
    _plot(scores, curves, folder / "report.png")
    plots = [str(folder / "report.png")]
    return {"table": str(folder / "report.md"), "plots": plots, "curves": list(curves), "text": text}


def _points(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the scores at each α."""
    points = scores.get("by_alpha") or scores.get("dial")  # "dial" in files of before
    if not points:
        return [scores]
    return [point | {"name": f"{scores['name']}, α = {point['alpha']:g}"} for point in points]


def table(scores: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with one row for each scored checkpoint."""
    if not scores:
        return ""
    columns = [*COLUMNS, *(c for c in METRICS if any(c[2] in row.get(c[1], {}) for row in scores))]
    lines = ["| | " + " | ".join(name for name, *_ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in scores:
        parts = [(row.get(part, {}), key, form) for _, part, key, form in columns]
        cells = [form.format(found[key], **found) if key in found else "–" for found, key, form in parts]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    first = scores[0]
    held_out = f"Held-out rows: {_counts(scores, 'task')} of the task"
    held_out += f", {_counts(scores, 'retention')} of retention." if "retention" in first else "."
    lines += ["", f"{held_out} Loss in nats per token; computed in {first['dtype'].removeprefix('torch.')}."]
    return "\n".join(lines) + "\n"


def _counts(scores: list[dict[str, Any]], part: str) -> str:
    """Returns how many rows of a part were scored; of each, where they differ and should not be compared."""
    counts = [str(row[part]["rows"]) for row in scores if part in row]
    return counts[0] if len(set(counts)) == 1 else f"{', '.join(counts)} (other rows each)"


def samples(scores: list[dict[str, Any]]) -> str:
    """Returns what each checkpoint writes for the same prompts, side by side, as Markdown."""
    lines = []
    # A checkpoint that could not generate has none.
    written: list[tuple[str, list[dict[str, str]]]] = [(row["name"], row.get("samples", [])) for row in scores]
    longest: list[dict[str, str]] = max((own for _, own in written), key=len, default=[])
    for index, sample in enumerate(longest):
        lines += [f"> {sample['prompt']}".replace("\n", "\n> "), "", "| | |", "|---|---|"]
        lines += [f"| {name} | {own[index]['output'] or '–'} |" for name, own in written if own[index:]]
        lines += [f"| *reference* | {sample['reference']} |", ""]
    return "\n".join(lines)


def _plot(scores: list[dict[str, Any]], curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure, (left, right) = new_figure(11, 4.2, columns=2)
    for name, points in curves.items():
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    left.set(title="Learning the new task", xlabel="step", ylabel="validation loss, nats per token")
    if curves:
        left.legend()
    known = [row for row in scores if "retention" in row]
    offset: dict[tuple[float, float], int] = {}
    for row in known:
        place = (row["task"]["loss"], row["retention"]["log_likelihood"])
        right.plot(*place, marker="o", markersize=8, linestyle="none")
        # Checkpoints that compute the same function lie on one point: their names go below each other.
        line = offset[place] = offset.get(place, -1) + 1
        right.annotate(row["name"], place, xytext=(9, -4 - 12 * line), textcoords="offset points")
    right.set(
        title="New task against retention (better: up, left)",
        xlabel="task loss on held-out rows, nats per token",
        ylabel="retention, log-likelihood per row, nats",
    )
    right.margins(x=0.4, y=0.25)  # room for the names
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_figure(path, figure)
