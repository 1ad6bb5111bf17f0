"""The pictures of a study: task against retention, and how far each layer moved."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from grow.analysis.figures import new_figure, write_figure

Point = dict[str, Any]
"""One run, or the mean of several seeds, at one α (report.point)."""

COLOURS = {
    "g_freeze": "tab:blue", "g_train": "tab:green", "lora": "tab:orange", "sft": "tab:red", "disel": "tab:purple",
    "g_lora": "tab:cyan", "ewc": "dimgrey",
}  # fmt: skip
NAMES = {
    "g_freeze": "G-Freeze", "g_train": "G-Train", "g_lora": "G-LoRA", "lora": "LoRA", "sft": "SFT", "disel": "DISeL",
    "ewc": "EWC", "queries": "G-Freeze, query heads", "heads": "G-Freeze, whole heads", "mlp": "G-Freeze, MLPs",
    "sft mlps": "SFT of the MLPs", "copies": "G-Freeze, copies",
}  # fmt: skip
_DRAWN = 0.2
"""Of the way from the best task loss back to the base's, what is drawn."""
_FEW = 8  # rows, all of which have room for their names
_LINE = 12.0
"""The height of a label's line, in points."""
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
    """Draws task loss over what is forgotten: each row's frontier over all its rates and α, which ends in the base, and
    the intervals over rows. Rows with the most seeds are named where they end, the plain ones of each method and those
    that are on the frontier of all; the others are faint, and stand in the tables.

    `methods` has the points of each row, by rate and α (report.over_seeds).
    """
    figure, axes = new_figure(8.6, 5.6)
    points = [one for own in methods.values() for one in own]
    key, least = forgotten(points), min(one["loss"] for one in points)
    fronts, shown = {label: frontier(own) for label, own in methods.items()}, _leading(methods)
    highest = least + _DRAWN * (base_loss - least)
    bottom = least - 0.06 * (highest - least)
    for label, front in fronts.items():
        colour = colour_of(label, front[0]["method"])
        look: dict[str, Any] = {"color": colour, "linewidth": 1.6, "markersize": 4.5, "zorder": 3}
        if label not in shown:
            look |= {"alpha": 0.25, "linewidth": 0.8, "markersize": 2.5, "zorder": 1}
        x, y = [one[key] for one in front], [one["loss"] for one in front]
        axes.plot([*x, 0.0], [*y, base_loss], "o-", clip_on=True, **look)
        if label in shown:
            axes.errorbar(
                x, y, xerr=[one[f"{key}_margin"] for one in front], fmt="none", ecolor=colour, alpha=0.4, capsize=2
            )
    height = 72 * 5.6 * 0.8
    ends = {label: fronts[label][0] for label in shown}
    places = apart({label: (end["loss"] - bottom) / (highest - bottom) * height for label, end in ends.items()})
    for label, end in ends.items():
        offset = (10, places[label] - (end["loss"] - bottom) / (highest - bottom) * height)
        name_end(axes, label, (end[key], end["loss"]), offset, colour_of(label, end["method"]))
    plain_ticks(axes, 0.01, min(one[key] for one in points), 10 * max(end[key] for end in ends.values()))
    rise = {
        "kl": "KL(base ‖ model) on general text, nats a token",
        "text": "rise of the loss on general text, nats a token",
    }
    axes.set(xlabel=f"{rise[key]}  (better: left)", ylabel="task loss on held-out rows, nats a token  (better: down)")
    axes.set_ylim(bottom, highest)
    axes.annotate(
        f" base, {base_loss:.2f} ↑", (0, 0.99), xycoords=("data", "axes fraction"), fontsize=9, color="dimgrey",
        va="top",
    )  # fmt: skip
    write_figure(path, figure)


def _leading(methods: dict[str, list[Point]]) -> list[str]:
    """Returns the rows whose names a picture shows: all of a few, else the plain ones and those that are ahead; of the
    rows with the most seeds, or of all and these, where few have so many."""
    most = max(one["seeds"] for own in methods.values() for one in own)
    sure = {label: own for label, own in methods.items() if max(one["seeds"] for one in own) == most}
    rows, kept = (sure, set[str]()) if len(sure) > _FEW else (methods, set(sure))
    if len(rows) <= _FEW:
        return list(rows)
    ahead = frontier(one for own in rows.values() for one in own)
    kept |= {label for label in rows if not {",", "third", "six"} & {*label.replace(",", " ,").split()}}
    return [label for label, own in rows.items() if label in kept or any(one in ahead for one in own)]


def colour_of(label: str, method: str) -> str:
    """Returns the colour of a row's method, the same in every picture; heads have one of their own."""
    return "navy" if label.startswith(("queries", "heads")) else COLOURS.get(method, "tab:brown")


def name_end(axes: Any, label: str, end: tuple[float, float], offset: tuple[float, float], colour: str) -> None:
    """Writes a row's name beside a line's end, `offset` points from it."""
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=2.5, foreground="white")]
    axes.annotate(
        named(label), end, offset, textcoords="offset points", color=colour, fontsize=9, va="center", zorder=5,
        path_effects=outline,
    )  # fmt: skip


def plain_ticks(axes: Any, linear: float, least: float, most: float) -> None:
    """Gives an axis of what is forgotten 0, the base, and from `linear` on a logarithmic scale, with plain numbers."""
    axes.set_xscale("symlog", linthresh=linear)
    ticks = [0.0, *(digit * 10.0**power for power in range(-3, 3) for digit in (1, 3))]
    axes.set_xticks([tick for tick in ticks if tick == 0 or linear <= tick <= most])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlim(min(-0.3 * linear, 1.3 * least), most)
    axes.axvline(0, color="dimgrey", linewidth=0.8)
    axes.grid(alpha=0.3)


def apart(places: dict[str, float]) -> dict[str, float]:
    """Returns heights of labels, in points, that are as near to the given ones as a line's height between them lets
    them be: from the middle outwards each makes room for the next."""
    found: dict[str, float] = {}
    ordered = sorted(places, key=lambda label: places[label])
    middle = len(ordered) // 2
    for label, below in zip(ordered[middle:], [None, *ordered[middle:]], strict=False):
        found[label] = places[label] if below is None else max(places[label], found[below] + _LINE)
    for label, above in zip(reversed(ordered[:middle]), reversed(ordered[1 : middle + 1]), strict=True):
        found[label] = min(places[label], found[above] - _LINE)
    return found


def named(label: str) -> str:
    """Returns a row's label in the field's names."""
    parts = re.match(r"(sft mlps|\w+)( upper| all)?", label)
    assert parts is not None
    where = {" upper": ", layers 6–17", " all": ", all layers"}.get(parts[2] or "", "")
    rest = label[parts.end() :].replace(", mlp ", ", MLPs ").replace("of sft", "of SFT")
    return NAMES.get(parts[1], parts[1]) + where + rest


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
