"""The pictures of a study: task against retention, and how far each layer moved."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from grow.analysis.figures import new_figure, write_figure

Point = dict[str, Any]
"""One run, or the mean of several seeds, at one α (report.point)."""

_MARKERS, _LINES = "osD^vPX*<>phd8", ("-", "--", ":")


def forgotten(points: Iterable[Point]) -> str:
    """Returns the figure by which points are compared: "kl", KL(base ‖ model) of general text, where all of them have
    it, else "text", the rise of what a token of it costs, as before there was the other."""
    return "text" if any(isnan(one["kl"]) for one in points) else "kl"


def frontier(points: Iterable[Point]) -> list[Point]:
    """Returns the Pareto-optimal points in loss on the task and what is forgotten, by their loss on the task."""
    points = list(points)
    key = forgotten(points)
    best, least = [], float("inf")
    for one in sorted(points, key=lambda p: (p["loss"], p[key])):
        if one[key] < least:
            best.append(one)
            least = one[key]
    return best


def draw_curves(methods: dict[str, list[Point]], base_loss: float, path: Path) -> None:
    """Draws task against general text. The left picture has each method over its rates, at α = 1, from the best loss to
    half of the way back to the base; the right one has each method's frontier over all its rates and α, where most of
    the task is learnt.

    `methods` has the points of each method, by rate and α (report.over_seeds).
    """
    figure, (left, right) = new_figure(12, 5.4, columns=2)
    points = [one for own in methods.values() for one in own]
    key = forgotten(points)
    looks = _looks({label: (own[0]["method"], max(one["seeds"] for one in own)) for label, own in methods.items()})
    for label, own in methods.items():
        trained = [one for one in own if one["alpha"] == 1]
        left.errorbar(
            [one["loss"] for one in trained], [one[key] for one in trained],
            yerr=[one[f"{key}_margin"] for one in trained], capsize=2, **{"label": label} | looks[label],
        )  # fmt: skip
        best = frontier(own)
        x, y = [*(one["loss"] for one in best), base_loss], [*(one[key] for one in best), 0.0]
        right.plot(x, y, **looks[label])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    least, lowest = min(one["loss"] for one in points), min(one[key] for one in points)
    for axes, share in ((left, 0.5), (right, 0.2)):
        axes.set_xlim(least - 0.02 * (base_loss - least), least + share * (base_loss - least))
    rise = {"kl": "KL(base ‖ model) on general text, nats per token", "text": "general text, rise in nats per token"}
    left.set(title="Over rates, as trained", ylabel=rise[key])
    right.set(title="The best over rates and α")
    for axes in (left, right):
        axes.set(xlabel="task loss on held-out rows, nats per token (better: left, down)")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=0.05)
        axes.set_ylim(bottom=min(2 * lowest, -0.01))
        axes.grid(alpha=0.3)
    write_figure(path, figure)


def draw_layers(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws how far each layer's MLP moved, Frobenius norm: a line for each method, at the rate that has learnt the
    task best, at its best α.

    Values are means over seeds. `lines` are those of a results.jsonl.
    """
    rates: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        rates[line["label"]][line["learning_rate"]].append(line)
    figure, axes = new_figure(9, 5)
    methods = {line["label"]: line["method"] for line in lines}
    looks = _looks({label: (methods[label], max(map(len, by_rate.values()))) for label, by_rate in rates.items()})
    for label, by_rate in rates.items():
        rate, best = min(by_rate.items(), key=lambda item: fmean(map(_least_loss, item[1])))
        layers = sorted(map(int, best[0]["updates"]))
        norms = [fmean(line["updates"][str(layer)] for line in best) for layer in layers]
        axes.plot(layers, norms, **{"label": f"{label}, {rate:g}"} | looks[label])
    axes.set(title="How far each layer's MLP moved", xlabel="layer", ylabel="update, Frobenius norm", ylim=(0, None))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    axes.grid(alpha=0.3)
    write_figure(path, figure)


def _least_loss(line: dict[str, Any]) -> float:
    return float(min(scores["task"]["loss"] for scores in line["by_alpha"]))


def _looks(rows: dict[str, tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Returns how each row, of a method and a number of seeds, is drawn. Rows with the most seeds have the colour of
    their method and a marker of their own; the others are grey, share one name, and are told apart in the tables."""
    colours = {method: f"C{place}" for place, method in enumerate(dict.fromkeys(method for method, _ in rows.values()))}
    most = max(seeds for _, seeds in rows.values())
    others = [label for label, (_, seeds) in rows.items() if seeds < most]
    looks: dict[str, dict[str, Any]] = {}
    taken: Counter[str] = Counter()
    for label, (method, _) in rows.items():
        if label in others:
            name = "others, of fewer seeds" if label == others[0] else "_"  # matplotlib leaves "_" out of a legend
            looks[label] = {"color": "0.8", "marker": ".", "linewidth": 0.8, "zorder": 0, "label": name}
            continue
        marker, line = _MARKERS[taken[method] % len(_MARKERS)], _LINES[taken[method] % len(_LINES)]
        looks[label] = {"color": colours[method], "marker": marker, "linestyle": line, "markersize": 5}
        taken[method] += 1
    return looks


def draw_steps(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws, over the steps of training, the task's validation loss on the left and the probe's retention (the change
    of a row's log-likelihood) on the right. There is a line for each method and rate, of means over seeds."""
    runs: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    for line in lines:
        runs[f"{line['label']}, {line['learning_rate']:g}"].append(line["history"])
    figure, (left, right) = new_figure(12, 4.4, columns=2)
    for label, own in runs.items():
        steps = [entry["step"] for entry in own[0]]
        left.plot(steps, [fmean(entry["eval_loss"] for entry in at) for at in zip(*own, strict=True)], label=label)
        if "retention" in own[0][0]:
            known = [fmean(entry["retention"] for entry in at) for at in zip(*own, strict=True)]
            right.plot(steps, [now - known[0] for now in known], label=label)
    left.legend(fontsize=8)
    left.set(title="The task, as trained", ylabel="validation loss, nats per token")
    right.set(title="Retention, as trained", ylabel="log-likelihood of a row, change in nats")
    right.axhline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
    write_figure(path, figure)
