"""Reports a study's results.jsonl (run.py): tables, and pictures of which method learns most and forgets least.

    python recipes/study/report.py recipes/study/results.jsonl --out FOLDER [--json]

Three measures of retention, all against the base and row by row. KL(base ‖ model) of the next token of general text,
nats a token, which no model has below 0. General text: how much more a token costs, nats, the mean over the sets of
running text (the measure of forgetting in PEFT's method comparison). Questions: how the log-likelihood of an answer
changed, nats, the mean over the sets of questions. They are never added: a model that learns to answer briefly gains on
questions what it loses elsewhere.
"""

import json as json_module
from collections import Counter, defaultdict
from math import hypot, isnan, nan, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from curves import Point, draw_curves, draw_layers, draw_steps, forgotten, frontier

from grow.analysis.effective_rank import draw_ranks, rank_table
from grow.analysis.figures import markdown
from grow.checkpoint.files import write_text
from grow.cli.arguments import run_script
from grow.errors import UserError

MARGIN = 0.01
"""General text or answers count as kept if a token or an answer costs at most this share more than with the base. They
are undecided if the 95 % interval crosses that bound."""
MARKS = {"kept": "✓", "undecided": "?", "lost": "✗"}
_SPREAD = {"loss": ".3f", "text": "+.3f", "questions": "+.2f"}
"""The figures whose spread over seeds is shown, and their formats."""
_MEANS = ("loss", "accuracy", "text", "text_margin", "questions", "questions_margin", "kl", "kl_margin")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a results.jsonl, in which older ones call their scores at each α "dial". Raises UserError
    for anything else."""
    try:
        lines = [json_module.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        lines = [{("by_alpha" if key == "dial" else key): value for key, value in line.items()} for line in lines]
        points = [point(line, scores) for line in lines for scores in line["by_alpha"]]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what recipes/study/run.py writes ({error!r})") from None
    if not points:
        raise UserError(f"{path}: has no line yet")
    return lines


def point(line: dict[str, Any], scores: dict[str, Any]) -> Point:
    """Returns the figures of one run at one α.

    `loss` of the task, nats per token, and `accuracy`, the share of rows answered correctly where an answer is one of
    several options, else of tokens; `text`, the rise of what a token of general text costs, nats, and `text_margin`,
    half its 95 % interval (sets are independent: their variances add); `questions` and `questions_margin`, the change
    of an answer's log-likelihood, nats; `sets`, each set's own change in its unit, and `set_margins`. `kl` and
    `kl_margin`, KL(base ‖ model) of general text, nats per token, the mean over its sets, and `kl_sets`, that of each
    set; NaN and {} in lines of before it was measured.
    """
    texts, sets, widths = set(line["general_text"]), {}, {}
    for name, known in scores["retention"].items():
        change, before = known["from_base"], line["base"]["retention"][name]
        unit = before["loss"] / before["log_likelihood"] if name in texts else 1.0  # negative for text: a cost rises
        sets[name] = change["log_likelihood"] * unit
        widths[name] = (change["interval"][1] - change["interval"][0]) / 2 * abs(unit)
    groups = {"text": [name for name in sets if name in texts], "questions": [n for n in sets if n not in texts]}
    found: Point = {"loss": scores["task"]["loss"], "accuracy": _accuracy(scores["task"])}
    found |= {"sets": sets, "set_margins": widths}
    for group, names in groups.items():
        found[group] = fmean(sets[name] for name in names) if names else nan
        found[f"{group}_margin"] = sqrt(sum(widths[name] ** 2 for name in names)) / max(1, len(names))
    found |= _divergence(scores["retention"], texts)
    same = {key: line[key] for key in ("label", "method", "learning_rate", "seed")}
    return same | {"alpha": scores["alpha"]} | found


def _divergence(retention: dict[str, Any], texts: set[str]) -> Point:
    known = [retention[name] for name in retention if name in texts]
    if not known or any("kl" not in own for own in retention.values()):
        return {"kl": nan, "kl_margin": nan, "kl_sets": {}}
    widths = [own["kl_interval"][1] - own["kl_interval"][0] for own in known]
    return {
        "kl": fmean(own["kl"] for own in known), "kl_margin": hypot(*widths) / 2 / len(known),
        "kl_sets": {name: own["kl"] for name, own in retention.items()},
    }  # fmt: skip


def _accuracy(task: dict[str, Any]) -> float:
    return float(task.get("accuracy", task["token_accuracy"]))


def study_report(path: Path, out: str) -> dict[str, Any]:
    """Writes OUT/study.md, which compares the leading methods, those with the most seeds. For each grid it also writes
    GRID.md, which compares all methods and has every point, GRID.png, GRID-layers.png, GRID-effective-rank-CELL.png of
    the cells that have it and, where validation was frequent, GRID-over-steps.png. Grids are of different size and are
    not mixed. Raises UserError as read_lines does."""
    grids: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(path):
        grids[line["grid"]].append(line)
    for grid in [grid for grid, lines in grids.items() if any(map(_on_another_page, lines))]:
        del grids[grid]
    folder = Path(out)
    parts: list[str] = []
    all_points: list[str] = []
    plots: list[Path] = []
    for grid, lines in grids.items():
        base, name = lines[0]["base"], grid.rpartition(".")[0] or grid
        points = over_seeds([point(line, scores) for line in lines for scores in line["by_alpha"]])
        title = f"{grid}: {_runs(lines)}\n"
        methods = _methods(points)
        parts += [
            f"### {title}",
            _leading(points),
            f"All points, and all methods at matched score: [{name}.md]({name}.md).\n",
        ]
        all_points.append(str(folder / f"{name}.md"))
        tables = [_table(points, lines[0]), _matched(methods, lines[0]), _kept(methods, lines[0]), *_seeds(points)]
        ranked = [line for line in lines if line.get("effective_rank")]
        tables += map(_ranks, ranked)
        write_text(all_points[-1], "\n".join([f"# {title}", *tables]))
        plots += [folder / f"{name}.png", folder / f"{name}-layers.png"]
        draw_curves(methods, base["task"]["loss"], plots[-2])
        draw_layers(lines, plots[-1])
        for line in ranked:
            plots.append(folder / f"{name}-effective-rank-{line['cell'].replace(' ', '-')}.png")
            draw_ranks(line["effective_rank"], plots[-1])
        if watched := [line for line in lines if len(line.get("history", [])) > 2]:
            plots.append(folder / f"{name}-over-steps.png")
            draw_steps(watched, plots[-1])
    text = "\n".join(parts)
    write_text(folder / "study.md", text)
    return {"table": str(folder / "study.md"), "points": all_points, "plots": list(map(str, plots)), "text": text}


def _on_another_page(line: dict[str, Any]) -> bool:
    """Says whether a line's grid is switch_report.py's or written.py's."""
    return bool(line.get("switched")) or any("generation" in known for known in line["base"]["retention"].values())


def _runs(lines: list[dict[str, Any]]) -> str:
    """Says how many runs there are, how long they are, and on which GPUs they ran, if on any."""
    runs = "1 run" if len(lines) == 1 else f"{len(lines)} runs"
    gpus = Counter(line["device"] for line in lines if not line.get("device", "CPU").startswith("CPU"))
    return ", ".join([f"{runs} of {lines[0]['max_steps']} steps", *(f"{n} on {gpu}" for gpu, n in gpus.items())])


def over_seeds(points: list[Point]) -> list[Point]:
    """Returns means over the seeds of a method, rate and α, with `seeds`, how many there are, and `ranges`, their least
    and most.

    Margins are not narrower than one seed's: all seeds score the same rows, whose own chance does not average out.
    """
    groups: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for one in points:
        groups[one["label"], one["learning_rate"], one["alpha"]].append(one)
    found = []
    for same in groups.values():
        means: dict[str, Any] = {key: fmean(one[key] for one in same) for key in _MEANS}
        for key in ("sets", "set_margins", "kl_sets"):
            means[key] = {name: fmean(one[key][name] for one in same) for name in same[0][key]}
        ranges = {key: (min(one[key] for one in same), max(one[key] for one in same)) for key in _SPREAD}
        found.append(same[0] | means | {"seeds": len(same), "ranges": ranges})
    return found


def verdict(rise: float, margin: float, bound: float) -> str:
    """Says whether a rise in cost, ± the margin, is "kept", "lost" or "undecided"."""
    return "kept" if rise + margin <= bound else "lost" if rise - margin > bound else "undecided"


def at_most(points: list[Point], loss: float) -> Point | None:
    """Returns the point that forgot least among those with at most this task loss; None if there is none."""
    key = forgotten(points)
    return min((one for one in points if one["loss"] <= loss), key=lambda p: p[key], default=None)


def _methods(points: list[Point]) -> dict[str, list[Point]]:
    """Returns the points of each method, by rate and then by α."""
    methods: dict[str, list[Point]] = defaultdict(list)
    for one in points:
        methods[one["label"]].append(one)
    return {label: sorted(own, key=lambda p: (p["learning_rate"], p["alpha"])) for label, own in methods.items()}


def targets(points: list[Point], base_loss: float) -> list[float]:
    """Returns five task losses at which to compare: the best of any method, rounded up, and parts of the way back."""
    best = min(one["loss"] for one in points)
    return [round(best + (base_loss - best) * share + 0.005, 2) for share in (0.0, 0.025, 0.05, 0.1, 0.2)]


def _leading(points: list[Point]) -> str:
    """Returns a table of task and general text at each α: a row for each method and rate, for points with the most
    seeds."""
    most = max(one["seeds"] for one in points)
    leading = [one for one in points if one["seeds"] == most]
    ahead = frontier(leading)
    alphas = sorted({one["alpha"] for one in leading})
    rows: dict[tuple[str, str], list[str]] = defaultdict(lambda: [""] * len(alphas))
    by_kl = forgotten(leading) == "kl"
    for one in leading:
        what = (
            f"{one['kl']:.4f} ± {one['kl_margin']:.4f}" if by_kl else f"{one['text']:+.3f} ± {one['text_margin']:.3f}"
        )
        cell = f"{one['loss']:.3f} at {what}"
        row = rows[one["label"], f"{one['learning_rate']:g}"]
        row[alphas.index(one["alpha"])] = f"**{cell}**" if one in ahead else cell
    seeds = "one seed" if most == 1 else f"means of {most} seeds"
    measure = "KL(base ‖ model) of general text" if by_kl else "the rise of general text"
    return (
        f"Task loss at {measure} ± half its 95 % interval over rows, nats per token, {seeds}; in bold "
        "the Pareto-optimal points.\n\n"
        + markdown(["method", "rate", *(f"α = {alpha:g}" for alpha in alphas)], [[*k, *r] for k, r in rows.items()])
    )


def _matched(methods: dict[str, list[Point]], line: dict[str, Any]) -> str:
    """Returns a table of forgetting at matched task score: a row for each method as trained, and one over all α."""
    losses = targets([one for own in methods.values() for one in own], line["base"]["task"]["loss"])
    questions = [name for name in line["base"]["retention"] if name not in line["general_text"]]
    rows = []
    for label, own in methods.items():
        for what, some in (("α = 1", [one for one in own if one["alpha"] == 1]), ("any α", own)):
            found = [at_most(some, loss) for loss in losses]
            rows.append([f"{label}, {what}", *(_forgot(one, questions) for one in found)])
    header = ["task loss at most", *(f"{loss:.2f}" for loss in losses)]
    return (
        "General text, rise in nats per token, of the point (rate, α) that forgot least of it at that task loss; and "
        "which set of questions fared worst there, change in nats an answer.\n\n" + markdown(header, rows)
    )


def _forgot(one: Point | None, questions: list[str]) -> str:
    if one is None:
        return "–"
    shown = f"{one['text']:+.3f} ± {one['text_margin']:.3f}"
    if not isnan(one["kl"]):
        shown = f"KL {one['kl']:.4f}, {shown}"
    if questions:
        worst = min(questions, key=lambda name: one["sets"][name])
        shown += f"; {worst} {one['sets'][worst]:+.2f}"
    return f"{shown} ({one['learning_rate']:g}, {one['alpha']:g})"


def _kept(methods: dict[str, list[Point]], line: dict[str, Any]) -> str:
    """Returns a table of the rates at which a method, as trained, keeps general text."""
    known = line["base"]["retention"]
    bound = MARGIN * fmean(known[name]["loss"] for name in line["general_text"]) if line["general_text"] else nan
    rows = []
    for label, own in methods.items():
        rates: dict[str, list[str]] = {"kept": [], "undecided": [], "lost": []}
        for one in (one for one in own if one["alpha"] == 1):
            rates[verdict(one["text"], one["text_margin"], bound)].append(f"{one['learning_rate']:g}")
        rows.append([label, *(", ".join(some) or "–" for some in rates.values())])
    return (
        "Rates at which general text is kept, as trained: "
        f"a token costs at most {MARGIN:.0%} more ({bound:.3f} nats).\n\n"
        + markdown(["method", "kept", "undecided", "lost"], rows)
    )


def _ranks(line: dict[str, Any]) -> str:
    return f"Effective rank of the weight updates, {line['cell']}; over the layers.\n\n" + rank_table(
        line["effective_rank"]
    )


_HEAD = ("method", "rate", "α", "seeds")


def _head(one: Point) -> list[str]:
    """Returns a point's cells under _HEAD."""
    return [one["label"], f"{one['learning_rate']:g}", f"{one['alpha']:g}", str(one["seeds"])]


def _seeds(points: list[Point]) -> list[str]:
    """Returns a table of how much the points with several seeds differ from seed to seed, or no table."""
    rows = []
    for one in (one for one in points if one["seeds"] > 1):
        row = _head(one)
        for key, form in _SPREAD.items():
            low, high = one["ranges"][key]
            row.append(f"{one[key]:{form}} ({low:{form}} to {high:{form}})")
        rows.append(row)
    header = [*_HEAD, "task loss", "general text", "questions"]
    return ["Over seeds: mean (least to most).\n\n" + markdown(header, rows)] if rows else []


def _table(points: list[Point], line: dict[str, Any]) -> str:
    base, texts = line["base"], set(line["general_text"])
    costs = {
        name: known["loss"] if name in texts else -known["log_likelihood"] for name, known in base["retention"].items()
    }
    names, ahead = list(points[0]["sets"]), frontier(points)
    rows = [["base", "", "", "", f"{base['task']['loss']:.3f}", f"{_accuracy(base['task']):.1%}", "0", "0"]]
    rows[0] += ["0"] * len(names)
    by_kl = forgotten(points) == "kl"
    if by_kl:
        rows[0][6:6] = ["0", ""]
    for one in points:
        row = [*_head(one), f"{one['loss']:.3f}", f"{one['accuracy']:.1%}"]
        if by_kl:
            worst = max(one["kl_sets"], key=lambda name: one["kl_sets"][name])
            row += [f"{one['kl']:.4f} ± {one['kl_margin']:.4f}", f"{worst} {one['kl_sets'][worst]:.3f}"]
        row += [f"{one['text']:+.3f} ± {one['text_margin']:.3f}"]
        row += ["–" if isnan(one["questions"]) else f"{one['questions']:+.2f} ± {one['questions_margin']:.2f}"]
        for name in names:
            rise = one["sets"][name] * (1 if name in texts else -1)
            mark = MARKS[verdict(rise, one["set_margins"][name], MARGIN * costs[name])]
            row.append(f"{one['sets'][name]:+.3f} {mark}")
        rows.append([f"**{cell}**" for cell in row] if one in ahead else row)
    measured = ["KL, general text", "worst set"] if by_kl else []
    columns = [*_HEAD, "task loss", "accuracy", *measured, "general text", "questions", *names]
    known = ", ".join(f"{known['rows']} of {name}" for name, known in base["retention"].items())
    kl = "KL: KL(base ‖ model) of the next token, nats; a model equal to the base has 0. " if by_kl else ""
    return markdown(columns, rows) + (
        f"\n{base['task']['rows']} rows of the task; {known}. {kl}General text: the rise of what a token costs, nats; "
        "questions: the change of an answer's log-likelihood, nats; against the base, with 95 % intervals over rows. "
        f"✓: it costs at most {MARGIN:.0%} more; ✗: it costs more; ?: the interval crosses that bound. "
        "In bold: no other row is better in both task and general text.\n"
    )


def report(results: str, out: str, json: bool = False) -> None:
    """Writes the tables and pictures of a study."""
    made = study_report(Path(results), out)
    print(json_module.dumps(made) if json else f"{made['text']}\nwritten: {', '.join([made['table'], *made['plots']])}")


if __name__ == "__main__":
    run_script(report, str(__doc__))
