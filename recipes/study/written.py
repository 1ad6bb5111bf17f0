"""The part of a study's scores that has to do with what models write: answers to questions of the retention sets.

    python recipes/study/written.py recipes/study/results.jsonl          # the tables of generation.md

A grid that has `shots`, a list, has each retention question answered greedily after so many others with their answers,
at most TOKENS tokens long.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from curves import named
from report import read_lines

from grow.analysis.figures import markdown
from grow.cli.arguments import run_script
from grow.evaluation.evaluate import known_sets

TOKENS = 8
_KEPT = ("exact_match", "begins", "rows", "intervals")


def together(parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns the scores of several runs of `eval` as one, by their number of shots: those of the first, in which each
    set has `generation`, by the number of shots. It has `common`, the three answers that were written most often, with
    how often, in place of all outputs."""
    first, *_ = parts.values()
    for place, point in enumerate(points(first)):
        for name, scores in known_sets(point).items():
            if "generation" in scores:  # running text has no questions
                found = {count: known_sets(points(part)[place])[name] for count, part in parts.items()}
                scores["generation"] = {str(count): _kept(own["generation"]) for count, own in found.items()}
    return first


def points(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the scores at each α."""
    return scores.get("by_alpha", [scores])


def _kept(answers: dict[str, Any]) -> dict[str, Any]:
    common = Counter(text.strip() for text in answers["outputs"]).most_common(3)
    return {key: answers[key] for key in _KEPT} | {"common": common}


def titled(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines of the grids in which answers were written, by the grid's name."""
    grids: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(path):
        if any("generation" in known for known in line["base"]["retention"].values()):
            grids[line["grid"]].append(line)
    return grids


def table(lines: list[dict[str, Any]]) -> str:
    """Returns a row for the base and for each cell, always on and with its switch: the share of answers that begin with
    the row's own, in percent, for each set and number of shots; and what was written most often without shots."""
    base = lines[0]["base"]
    asked = [name for name, known in base["retention"].items() if "generation" in known]
    shots = list(base["retention"][asked[0]]["generation"])
    texts = lines[0]["general_text"]
    rows = []
    for name, rate, scores in _ways(lines):
        task, known = scores["task"], scores["retention"]
        kl = fmean(known[text].get("kl", 0.0) for text in texts)
        row = [name, rate, f"{task['accuracy']:.1%}" if "accuracy" in task else f"{task['loss']:.3f}", f"{kl:.3f}"]
        row += [_share(known[one]["generation"][count]) for one in asked for count in shots]
        row.append("; ".join(_most(one, known[one]["generation"][shots[0]]) for one in asked))
        rows.append(row)
    header = ["", "rate", "task", "KL", *(f"{one}, {count} shots" for one in asked for count in shots)]
    counts = ", ".join(f"{base['retention'][one]['generation'][shots[0]]['rows']} of {one}" for one in asked)
    return markdown([*header, f"written most, {shots[0]} shots"], rows) + (
        f"\nWhat is written begins with the answer, %, of {counts}, with half the 95 % interval over rows; greedy, "
        f"at most {TOKENS} tokens. Task: accuracy, or loss, nats a token. KL(base ‖ model) of general text, nats a "
        "token.\n"
    )


def _ways(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "base", "", lines[0]["base"]
    for line in lines:
        yield named(line["label"]), f"{line['learning_rate']:g}", line["by_alpha"][-1]
        for kind, scores in line["switched"].items():
            yield f"{named(line['label'])}, switch by {kind}", f"{line['learning_rate']:g}", scores


def _share(answers: dict[str, Any]) -> str:
    low, high = answers["intervals"]["begins"]
    return f"{100 * answers['begins']:.1f} ± {50 * (high - low):.1f}"


def _most(name: str, answers: dict[str, Any]) -> str:
    text, count = answers["common"][0]
    shown = " ".join(text.split()).replace("|", "\\|")
    return f"{name}: {shown!r} ({count})"


def tables(results: str) -> None:
    """Prints a table for each grid."""
    print("\n".join(f"### {name}\n\n{table(lines)}" for name, lines in titled(Path(results)).items()))


if __name__ == "__main__":
    run_script(tables, str(__doc__))
