"""Reports the grids that have switches (switch.yaml): the table and the picture of switch.md, from results.jsonl.

    python recipes/study/switch_report.py recipes/study/results.jsonl --out FOLDER

A row is a method always on, or as it is used, with a kind of switch. What is left of the base is KL(base ‖ model) of
general text, nats a token, the mean over its sets; the set that is furthest away, questions by their answers' tokens;
and how many rows of all sets have the base's logits, bit for bit.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from statistics import fmean
from typing import Any

from curves import apart, colour_of, name_end, named, plain_ticks
from report import read_lines

from grow.analysis.figures import markdown, new_figure, write_figure
from grow.checkpoint.files import write_text
from grow.cli.arguments import run_script

ON = "always on"
KINDS = {"row": "a row", "answer": "an answer", "token": "a token"}
_PANEL = 290.0
"""The height of a panel, in points."""


@dataclass(frozen=True)
class Used:
    """Holds a method's scores, always on or with a kind of switch, means over seeds."""

    label: str
    method: str
    rate: float
    how: str
    seeds: int
    loss: float
    spread: tuple[float, float]
    metric: str
    kl: float
    kl_margin: float
    worst: str
    identical: int
    rows: int
    opened: float


def used(lines: list[dict[str, Any]]) -> list[Used]:
    """Returns the rows of one grid's table, by method, rate and how it is used."""
    groups: dict[tuple[str, float, str], list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for line in lines:
        for how, scores in _ways(line):
            groups[line["label"], line["learning_rate"], how].append((line, scores))
    return [_mean(*key, same) for key, same in groups.items()]


def _mean(label: str, rate: float, how: str, same: list[tuple[dict[str, Any], dict[str, Any]]]) -> Used:
    """Returns the means of the scores of several seeds, each with its line."""
    line, points = same[0][0], [scores for _, scores in same]
    losses = [scores["task"]["loss"] for scores in points]
    rows = {name: known["rows"] for name, known in points[0]["retention"].items()}
    kl, identical = ({n: fmean(s["retention"][n][key] for s in points) for n in rows} for key in ("kl", "identical"))
    texts, worst = line["general_text"], max(kl, key=lambda name: kl[name])
    widths = [[high - low for low, high in (s["retention"][n]["kl_interval"] for n in texts)] for s in points]
    return Used(
        label, line["method"], rate, how, len(same), fmean(losses), (min(losses), max(losses)), _metric(points),
        fmean(kl[name] for name in texts), fmean(hypot(*own) / 2 / len(texts) for own in widths),
        f"{worst} {kl[worst]:.3f}" if kl[worst] else "", round(sum(identical[n] * rows[n] for n in rows)),
        sum(rows.values()), fmean(scores["task"].get("opened", 1.0) for scores in points),
    )  # fmt: skip


def _metric(points: list[dict[str, Any]]) -> str:
    if "accuracy" in points[0]["task"]:
        return f"{fmean(scores['task']['accuracy'] for scores in points):.1%}"
    written = [scores["task"]["chrf"] for scores in points if "chrf" in scores["task"]]  # of some seeds alone
    return f"{fmean(written):.1f}" if written else ""


def _ways(line: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields how a cell was scored, and its scores."""
    yield ON, line["by_alpha"][-1]
    yield from line["switched"].items()


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table of one grid."""
    base = lines[0]["base"]["task"]
    metric = "accuracy" if "accuracy" in base else "chrF"
    header = ["method", "rate", "on", "seeds", "task loss", metric, "KL, text", "worst set", "identical", "task opens"]
    rows = [["base", "", "", "", f"{base['loss']:.3f}", _metric([lines[0]["base"]]), "0", "", "all", ""]]
    for one in used(lines):
        loss = f"{one.loss:.3f}" + (f" ({one.spread[0]:.3f} to {one.spread[1]:.3f})" if one.seeds > 1 else "")
        kl = f"{one.kl:.4f} ± {one.kl_margin:.4f}" if one.kl else "0"
        how = ON if one.how == ON else f"by {KINDS[one.how]}"
        same = f"{one.identical:,} of {one.rows:,}"
        rows.append([named(one.label), f"{one.rate:g}", how, str(one.seeds), loss, one.metric, kl, one.worst, same])
        rows[-1].append("" if one.how == ON else f"{one.opened:.1%}")
    return markdown(header, rows)


def draw(grids: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws task loss over KL from the base, a panel for each grid: always on, and with the switch, at the left."""
    figure, panels = new_figure(6.2 * len(grids), 5.2, columns=len(grids))
    for axes, (title, lines) in zip([panels] if len(grids) == 1 else panels, grids.items(), strict=True):
        points = used(lines)
        best: dict[str, dict[str, Used]] = defaultdict(dict)
        for one in points:
            before = best[one.label].get(one.how)
            if before is None or one.loss < before.loss:
                best[one.label][one.how] = one
        shown = [one for ways in best.values() for how, one in ways.items() if how in (ON, "row")]
        losses = [one.loss for one in shown]
        middle, span = (max(losses) + min(losses)) / 2, max(0.15, 1.4 * (max(losses) - min(losses)))
        axes.set_ylim(middle - span / 2, middle + span / 2)
        places = apart({label: (ways[ON].loss - middle) / span * _PANEL for label, ways in best.items()})
        for label, ways in best.items():
            always, row = ways[ON], ways.get("row")
            colour = colour_of(label, always.method)
            look: dict[str, Any] = {"color": colour, "markersize": 8, "zorder": 3}
            axes.plot(always.kl, always.loss, "o", markerfacecolor="white", **look)
            offset = (9, places[label] - (always.loss - middle) / span * _PANEL)
            name_end(axes, label, (always.kl, always.loss), offset, colour)
            if row is not None:
                axes.plot([row.kl, always.kl], [row.loss, always.loss], color=colour, linewidth=1, alpha=0.5)
                axes.plot(row.kl, row.loss, "o", **look)
        plain_ticks(axes, 0.01, 0.0, 40 * max(one.kl for one in shown))
        axes.set(title=title, xlabel="KL(base ‖ model) on general text, nats a token", ylabel="task loss, nats a token")
        base = f"at 0: the base, bit for bit; its task loss is {lines[0]['base']['task']['loss']:.2f}"
        axes.annotate(base, (0.02, 0.97), xycoords="axes fraction", fontsize=8, color="grey", va="top")
    figure.suptitle("Hollow: always on. Filled: with its switch, by row.", fontsize=10)
    write_figure(path, figure)


def titled(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines of the grids with switches, by the titles of their panels."""
    names = {"switch.yaml": "English to French", "switch_entailment.yaml": "entailment"}
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        if line["grid"] in names:
            found.setdefault(names[line["grid"]], []).append(line)
    return found


def switch_report(results: str, out: str) -> None:
    """Writes OUT/switch_tables.md and OUT/switch.png."""
    grids = titled(Path(results))
    text = "\n".join(f"### {name}\n\n{table(lines)}" for name, lines in grids.items())
    write_text(Path(out) / "switch_tables.md", text)
    draw(grids, Path(out) / "switch.png")
    print(text)


if __name__ == "__main__":
    run_script(switch_report, str(__doc__))
