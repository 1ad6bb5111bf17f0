"""What the lines of a study's results.jsonl (recipes/study/run.py) come to: a table, and the pictures of who learns
most and forgets least.

Old knowledge is what the log-likelihood of a row has changed by, against the base, row by row: the mean of each set's
mean, so that no set weighs more for having more rows. Below zero something was forgotten.
"""

import json
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from grow.errors import UserError
from grow.tables import markdown, new_figure, write_figure, write_text

Point = dict[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl. Raises UserError for anything else."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        points = [point(line, place) for line in lines for place in line["dial"]]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what recipes/study/run.py writes ({error!r})") from None
    if not points:
        raise UserError(f"{path}: has no line yet")
    return lines


def point(line: dict[str, Any], place: dict[str, Any]) -> Point:
    """One place of the dial of one run: `loss` of the task, nats per token; `kept`, the change of old knowledge, nats
    per row, with its 95 % half-width `margin` (sets are independent: their variances add)."""
    changes = {name: known["from_base"] for name, known in place["retention"].items()}
    widths = [(change["interval"][1] - change["interval"][0]) / 2 for change in changes.values()]
    return {
        "label": line["label"],
        "learning_rate": line["learning_rate"],
        "alpha": place["alpha"],
        "seed": line["seed"],
        "loss": place["task"]["loss"],
        "accuracy": place["task"]["token_accuracy"],
        "kept": fmean(change["log_likelihood"] for change in changes.values()),
        "margin": sqrt(sum(width**2 for width in widths)) / len(widths),
        "sets": {name: change["log_likelihood"] for name, change in changes.items()},
    }


def study_report(path: Path, out: str) -> dict[str, Any]:
    """Writes OUT/study.md and OUT/study.png. Raises UserError as read_lines does."""
    lines, folder = read_lines(path), Path(out)
    points = over_seeds([point(line, place) for line in lines for place in line["dial"]])
    text = _table(points, lines[0]["base"])
    plot(points, lines[0]["base"]["task"]["loss"], folder / "study.png")
    write_text(folder / "study.md", text)
    return {"table": str(folder / "study.md"), "plot": str(folder / "study.png"), "text": text}


def over_seeds(points: list[Point]) -> list[Point]:
    """Means over the seeds of a method, rate and α; `seeds` says of how many."""
    groups: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for one in points:
        groups[one["label"], one["learning_rate"], one["alpha"]].append(one)
    found = []
    for same in groups.values():
        means = {key: fmean(one[key] for one in same) for key in ("loss", "accuracy", "kept")}
        sets = {name: fmean(one["sets"][name] for one in same) for name in same[0]["sets"]}
        margin = sqrt(sum(one["margin"] ** 2 for one in same)) / len(same)
        found.append(same[0] | means | {"sets": sets, "margin": margin, "seeds": len(same)})
    return found


def frontier(points: list[Point]) -> list[Point]:
    """Those that no other beats in both, task and old knowledge; by their loss on the task."""
    best, kept = [], float("-inf")
    for one in sorted(points, key=lambda p: (p["loss"], -p["kept"])):
        if one["kept"] > kept:
            best.append(one)
            kept = one["kept"]
    return best


def _table(points: list[Point], base: dict[str, Any]) -> str:
    names, ahead = list(points[0]["sets"]), frontier(points)
    rows = [["base", "", "", "", f"{base['task']['loss']:.3f}", f"{base['task']['token_accuracy']:.1%}", "0"]]
    rows[0] += ["0"] * len(names)
    for one in points:
        row = [one["label"], f"{one['learning_rate']:g}", f"{one['alpha']:g}", str(one["seeds"]), f"{one['loss']:.3f}"]
        row += [f"{one['accuracy']:.1%}", f"{one['kept']:+.2f} ± {one['margin']:.2f}"]
        row += [f"{one['sets'][name]:+.2f}" for name in names]
        rows.append([f"**{cell}**" for cell in row] if one in ahead else row)
    columns = ["method", "rate", "α", "seeds", "task loss", "accuracy", "old knowledge", *names]
    known = ", ".join(f"{known['rows']} of {name}" for name, known in base["retention"].items())
    return markdown(columns, rows) + (
        f"\n{base['task']['rows']} rows of the task; {known}. Old knowledge is the change of a row's log-likelihood "
        "against the base, nats, with its 95 % interval. In bold: no other row is better in both.\n"
    )


def plot(points: list[Point], base_loss: float, path: Path) -> None:
    """Task against old knowledge: left each method over its rates, at α = 1; right over α, at each rate."""
    figure, (left, right) = new_figure(12, 4.8, columns=2)
    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(one["label"] for one in points))}
    for label, colour in colours.items():
        own = [one for one in points if one["label"] == label]
        trained = sorted((one for one in own if one["alpha"] == 1), key=lambda p: p["learning_rate"])
        left.errorbar(
            [one["loss"] for one in trained], [one["kept"] for one in trained],
            yerr=[one["margin"] for one in trained], marker="o", markersize=4, capsize=2, color=colour, label=label,
        )  # fmt: skip
        for rate in sorted({one["learning_rate"] for one in own}):
            curve = sorted((one for one in own if one["learning_rate"] == rate), key=lambda p: p["alpha"])
            x, y = [base_loss, *(one["loss"] for one in curve)], [0.0, *(one["kept"] for one in curve)]
            right.plot(x, y, marker=".", linewidth=1, color=colour)
    left.legend(fontsize=8)
    left.set(title="Over rates, as trained", ylabel="old knowledge, change of log-likelihood per row, nats")
    right.set(title="Over α, a line for each rate")
    for axes in (left, right):
        axes.set(xlabel="task loss on held-out rows, nats per token (better: left, up)")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
    write_figure(path, figure)
