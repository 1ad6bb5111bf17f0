"""A study runs what is missing of its grid, and its report has the numbers of its results."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import pages
from report import over_seeds, point, read_lines, study_report, verdict
from skills import table as skills_table
from switch_detectors import tables
from switch_report import table as used_table
from switch_report import titled
from switch_template import table as template_table
from switched import chosen
from written import table as written_table
from written import titled as written_titled
from written import together

from grow.checkpoint.run_folder import last_checkpoint
from grow.errors import UserError
from tests.helpers.slurm_cluster import wait_for
from tests.helpers.tiny import ROOT, grow, make_recipe, run, step_lines

ALPHAS = (0.5, 1)
FIELDS = {"adam_beta1": 0.5}


def make_grid(folder: Path, base: Path, sums: Path) -> Path:
    known = folder / "known"
    known.mkdir()
    rows = [{"prompt": f"{number}-{number}=", "completion": "0"} for number in range(30)]
    (known / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prose").mkdir()
    for split in ("train", "test"):
        (folder / "prose" / f"{split}.jsonl").write_text("".join(f'{{"text": "{n}+{n}={2 * n}"}}\n' for n in range(30)))
    make_recipe(folder / "recipe.yaml", base, folder / "grown", sums, 1, retention=str(known))
    learnt = {"learn_alphas": {"text": f"{folder}/prose", "steps": 2}}
    grid = {
        "recipe": "recipe.yaml", "general_text": ["prose"],
        "fields": {"max_steps": 4, "save_steps": 4, "retention_sets": [f"{folder}/prose[:12]"]},
        "alphas": list(ALPHAS), "limit": 20, "retention_limit": 20, "seeds": [0],
        "effective_rank": ["some layers 0.01 seed 0"],
        "methods": {
            "sft": {"method": "sft", "learning_rate": [1e-3]},
            "some layers": {"method": "g_freeze", "layers": "1-2", "learning_rate": [1e-2], "fields": FIELDS} | learnt,
        },
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder / "grid.yaml"


def study(grid: Path, *more: str, code: int = 0) -> str:
    command = (sys.executable, ROOT / "recipes/study/run.py", grid, "--work", grid.parent / "work", *more)
    return run(*command, code=code).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "sft 1 seed 0"), "has no row and no cell"),
        (("--seeds", "0,x"), "a number is needed"),
        (("--seed", "1"), "did you mean --seeds"),
        (("--alphas", "0.5,x"), "a number is needed"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], message: str, text_base: Path, sums: Path, tmp_path: Path
) -> None:
    error = study(make_grid(tmp_path, text_base, sums), *words, code=2)
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is a list"),
        ({"learning_rates": [1e-3]}, "did you mean learning_rate?"),
        ({"learning_rate": [1e-3], "method": "adapter"}, "does not end in a checkpoint to be scored"),
        ({"learning_rate": [1e-3], "layers": "all"}, "of no other"),
        ({"learning_rate": [1e-3], "method": "g_train"}, "say which grow"),
    ],
)
def test_a_row_that_makes_no_sense_is_one_line(
    row: dict[str, object], message: str, text_base: Path, sums: Path, tmp_path: Path
) -> None:
    grid = make_grid(tmp_path, text_base, sums)
    content = yaml.safe_load(grid.read_text())
    content["methods"]["new"] = {"method": "sft"} | row
    grid.write_text(yaml.safe_dump(content))
    error = study(grid, code=2)
    assert error.count("\n") == 1 and "run.py: new: " in error and message in error
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("methods: [", "is not YAML"), ("recipe: x.yaml", "does not say fields"), ("", "is not a grid")],
)
def test_what_is_no_grid_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    error = study(tmp_path / "grid.yaml", code=2)
    assert error.count("\n") == 1 and message in error and not (tmp_path / "work").exists()


@pytest.mark.full
def test_a_study_goes_on_and_its_report_has_its_numbers(text_base: Path, sums: Path, tmp_path: Path) -> None:
    grid = make_grid(tmp_path, text_base, sums)
    study(grid, "--only", "sft 0.001 seed 0")
    results = tmp_path / "results.jsonl"
    (first,) = results.read_text().splitlines()
    with ThreadPoolExecutor() as pool:
        said = "".join(pool.map(study, (grid, grid)))
    assert said.count("== 2 of 2: some layers 0.01 seed 0") == 1, "a cell that one runs, the other leaves to it"
    assert "== 1 of 2" not in said
    assert study(grid).count("==") == 0
    assert study(grid, "--only", "sft").count("==") == 0, "of a row, what is missing"
    again, second = results.read_text().splitlines()
    assert again == first, "what is done stays"
    assert not list((tmp_path / "work").glob("*seed-0")), "checkpoints are removed"
    assert json.loads(second)["fields"] == FIELDS and len(json.loads(second)["learnt_alphas"]) == 2
    for line in map(json.loads, (first, second)):
        assert [place["alpha"] for place in line["by_alpha"]] == list(ALPHAS)
        assert line["by_alpha"][1]["task"]["loss"] != line["base"]["task"]["loss"]
    text = grow("report", results, "--out", tmp_path / "out").stdout
    text += "\n" + (tmp_path / "out" / "grid.md").read_text()
    for plot in ("grid", "grid-layers", "grid-over-steps", "grid-effective-rank-some-layers-0.01-seed-0"):
        assert (tmp_path / "out" / f"{plot}.png").stat().st_size > 10_000
    losses = [place["task"]["loss"] for line in (first, second) for place in json.loads(line)["by_alpha"]]
    places = [place["retention"] for line in (first, second) for place in json.loads(line)["by_alpha"]]
    changes = [known["known"]["from_base"]["log_likelihood"] for known in places]
    base = json.loads(first)["base"]["retention"]["prose"]
    assert [known["prose"]["rows"] for known in places] == [12] * 4
    rises = [known["prose"]["loss"] - base["loss"] for known in places]
    tables = [
        [re.split(r" *\| *", line.replace("**", ""))[1:-1] for line in part.splitlines() if line.startswith("| ")][2:]
        for part in re.split(r"\n\n(?=[A-Z]|\| method \| rate)", text)
    ]
    leading, (_, *every), matched, kept, ranks = (table for table in tables if table)
    divergences = [known["prose"]["kl"] for known in places]
    assert json.loads(second)["kl"] == {name: own["kl"] for name, own in places[-1].items()}
    assert all(kl > 0 and known["known"]["identical"] == 0 for kl, known in zip(divergences, places, strict=True))
    cells = [f"{loss:.3f} at {kl:.4f}" for loss, kl in zip(losses, divergences, strict=True)]
    leading = [[cell.partition(" ± ")[0] for cell in row] for row in leading]
    assert leading == [["sft", "0.001", *cells[:2]], ["some layers", "0.01", *cells[2:]]]
    assert [row[4] for row in every] == [f"{loss:.3f}" for loss in losses]
    assert [row[6].split(" ")[0] for row in every] == [f"{kl:.4f}" for kl in divergences]
    assert [row[8].split(" ")[0] for row in every] == [f"{rise:+.3f}" for rise in rises]
    bound = 0.01 * base["loss"]
    sides = [("✓" if rise <= bound else "✗", row[11][-1]) for row, rise in zip(every, rises, strict=True)]
    assert all(mark in ("?", side) for side, mark in sides)
    assert [row[9].split(" ")[0] for row in every] == [f"{change:+.2f}" for change in changes]
    assert [row[0] for row in matched] == [f"{m}, {a}" for m in ("sft", "some layers") for a in ("α = 1", "any α")]
    for row, own in zip(matched[1::2], (slice(0, 2), slice(2, 4)), strict=True):
        first_target = float(re.search(r"task loss at most \| ([\d.]+)", text)[1])
        enough = [kl for kl, loss in zip(divergences[own], losses[own], strict=True) if loss <= first_target]
        assert row[1].split(",")[0] == (f"KL {min(enough):.4f}" if enough else "–")
        assert all(re.search(r"; known [+-]\d\.\d\d \(", cell) for cell in row[1:] if cell != "–")
    of_gate = [f["effective_rank"] for f in json.loads(second)["effective_rank"] if f["matrix"] == "mlp.gate_proj"]
    assert len(of_gate) == 2 and json.loads(first)["effective_rank"] == []
    assert ranks[1][:4] == ["mlp.gate_proj", f"{sum(of_gate) / 2:.3g}", f"{min(of_gate):.3g}", f"{max(of_gate):.3g}"]
    assert [row[0] for row in kept] == ["sft", "some layers"] and all(row.count("–") == 2 for row in kept)


@pytest.mark.full
def test_asked_to_leave_it_leaves_a_checkpoint(text_base: Path, sums: Path, tmp_path: Path) -> None:
    grid = make_grid(tmp_path, text_base, sums)
    grid.write_text(
        grid.read_text().replace("max_steps: 4", "max_steps: 4000").replace("save_steps: 4", "save_steps: 4000")
    )
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, ROOT / "recipes/study/run.py", grid, "--work", tmp_path / "work"]
        process = subprocess.Popen(command, stderr=log)
    wait_for(lambda: step_lines((tmp_path / "log").read_text()) or process.poll() is not None, 300, "a step")
    process.terminate()
    assert process.wait(120) == 75
    assert (last_checkpoint(tmp_path / "work" / "sft-0.001-seed-0") / "COMPLETE").exists()
    assert not (tmp_path / "results.jsonl").exists()


def test_seeds_are_brought_together() -> None:
    """Their means and their range; margins over rows do not shrink, since the rows are the same."""
    one = {"label": "sft", "learning_rate": 1e-5, "alpha": 1, "seed": 0, "accuracy": 0.5, "questions": 0.25}
    one |= {"questions_margin": 0.02, "text_margin": 0.01, "sets": {"a": 0.5}, "set_margins": {"a": 0.1}}
    one |= {"kl": 0.1, "kl_margin": 0.01, "kl_sets": {"a": 0.1}}
    seeds = [one | {"loss": loss, "text": text, "seed": n} for n, (loss, text) in enumerate([(1.5, 0.1), (1.7, 0.3)])]
    other = one | {"loss": 2.0, "text": 0.5, "alpha": 0.5}
    mean, alone = over_seeds([*seeds, other])
    assert (mean["loss"], mean["text"], mean["text_margin"], mean["seeds"]) == (1.6, 0.2, 0.01, 2)
    assert mean["ranges"]["loss"] == (1.5, 1.7) and mean["set_margins"] == {"a": 0.1}
    assert (alone["loss"], alone["seeds"], alone["ranges"]["text"]) == (2.0, 1, (0.5, 0.5))


@pytest.mark.parametrize(
    ("rise", "margin", "said"),
    [(0.02, 0.005, "kept"), (0.02, 0.02, "undecided"), (0.04, 0.02, "undecided"), (0.06, 0.02, "lost")],
)
def test_a_verdict_needs_the_whole_interval(rise: float, margin: float, said: str) -> None:
    assert verdict(rise, margin, 0.03) == said


def test_of_text_a_rise_is_a_loss_and_its_margin_is_no_less_wide() -> None:
    """Their unit, nats a token for nats a row, is negative."""
    known = {"loss": 3.0, "log_likelihood": -300.0}
    change = {"from_base": {"log_likelihood": -6.0, "interval": [-9.0, -3.0]}}
    line = {"label": "sft", "method": "sft", "learning_rate": 1e-5, "seed": 0, "general_text": ["prose"]}
    place = {"alpha": 1, "task": {"loss": 1.0, "token_accuracy": 0.5}, "retention": {"prose": change, "asked": change}}
    found = point(line | {"base": {"retention": {"prose": known, "asked": known}}}, place)
    assert found["sets"] == {"prose": pytest.approx(0.06), "asked": -6.0}
    assert found["set_margins"] == {"prose": pytest.approx(0.03), "asked": 3.0}
    assert (found["text_margin"], found["questions_margin"]) == (pytest.approx(0.03), 3.0)


def test_the_readmes_numbers_are_those_of_the_results(tmp_path: Path) -> None:
    text = study_report(ROOT / "recipes/study/results.jsonl", str(tmp_path))["text"]
    assert text.count("\n| ") > 20 and text in (ROOT / "recipes/study/README.md").read_text()
    points = [path for path in tmp_path.glob("*.md") if path.name != "study.md"]
    assert points and all(path.read_text() == (ROOT / "recipes/study" / path.name).read_text() for path in points)


def test_pages_are_written_from_the_results(tmp_path: Path) -> None:
    """What pages.py makes of them is what stands there, pictures included by name."""
    folder = ROOT / "recipes/study"
    names = ("README.md", "switch.md", "generation.md", "results.jsonl")
    for name in names:
        (tmp_path / name).write_text((folder / name).read_text())
    pages(str(tmp_path))
    assert all((tmp_path / name).read_text() == (folder / name).read_text() for name in names)
    there = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} <= there
    (tmp_path / "switch.md").write_text("no comments")
    with pytest.raises(UserError, match="must stand in it once"):
        pages(str(tmp_path))


def test_both_pages_conclusions_are_of_points_in_the_results() -> None:
    """Of one seed or of several."""
    grids: dict[str, list[dict]] = {}
    for line in read_lines(ROOT / "recipes/study/results.jsonl"):
        grids.setdefault(line["grid"], []).extend(point(line, place) for place in line["by_alpha"])
    known = {(f"{p['loss']:.3f}", f"{p['text']:+.3f}") for own in grids.values() for p in [*own, *over_seeds(own)]}
    for name, heading, least in (
        ("recipes/study/README.md", "What it says", 30),
        ("recipes/study/README.md", "In short", 10),
        ("README.md", "Which method", 4),
    ):
        page = (ROOT / name).read_text().replace("−", "-")
        section = page.partition(f"\n## {heading}")[2].partition("\n## ")[0]
        shown = set(re.findall(r"(\d\.\d{3}) at ([+-]\d\.\d{3})", section))
        assert len(shown) >= least and shown <= known, shown - known


def test_the_switch_pages_tables_are_those_of_its_results() -> None:
    folder = ROOT / "recipes/study"
    page = (folder / "switch.md").read_text()
    found = json.loads((folder / "switch_detectors.json").read_text())
    assert len(found["layers"]) == 2 and tables(found) in page
    grids = titled(folder / "results.jsonl")
    assert len(grids) == 2 and all(f"### {name}\n\n{used_table(lines)}" in page for name, lines in grids.items())
    assert skills_table(json.loads((folder / "skills.json").read_text())) in page
    assert template_table(json.loads((folder / "switch_template.json").read_text())) in page


def test_the_page_of_written_answers_has_the_tables_of_its_results() -> None:
    folder = ROOT / "recipes/study"
    page, grids = (folder / "generation.md").read_text(), written_titled(folder / "results.jsonl")
    assert grids and all(f"### {name}\n\n{written_table(lines)}" in page for name, lines in grids.items())


def test_two_whole_models_are_each_where_the_switch_says() -> None:
    """Rows that opened have the trained model's scores, the others the base's, at KL 0."""
    kl, trained = [0.5, 0.25, 0.0, 1.0], [-1.0, -2.0, -3.0, -4.0]
    own: dict[str, Any] = {
        "items": trained,
        "kl_items": kl,
        "loss": 1.25,
        "log_likelihood": -2.5,
        "rows": 4,
        "intervals": {"kl": (0, 1)},
    }
    base = {"items": [-5.0, -6.0, -7.0, -8.0], "accuracy_items": [0, 0, 1, 1]}
    own |= {"accuracy_items": [1, 1, 0, 0], "label_items": [1, 3, 2, 2], "identical_items": [0, 0, 1, 0]}
    opened = {"opened_items": [1, 0, 0, 1]}
    results = [{"alpha": 1, "task": one, "retention": one, "retention_sets": {}} for one in (own, base, opened)]
    found = chosen(*results)["task"]
    assert found["loss"] == pytest.approx((1 + 6 + 7 + 4) / 8), "of eight labels, as 2.5 a row and 1.25 a label say"
    assert (found["kl"], found["identical"], found["opened"]) == (pytest.approx(1.5 / 8), 0.5, 0.5)
    assert found["accuracy"] == (1 + 0 + 1 + 0) / 4
    assert found["from_base"]["log_likelihood"] == pytest.approx((4 + 0 + 0 + 4) / 4)


def test_written_answers_of_several_shots_stand_side_by_side() -> None:
    def scores(*outputs: str) -> dict[str, Any]:
        answers = {"exact_match": 0.5, "begins": 0.5, "rows": 4, "intervals": {"begins": (0.1, 0.9)}}
        known = {"rows": 4, "kl": 0.25, "generation": answers | {"outputs": list(outputs)}}
        return {
            "alpha": 1,
            "retention": known,
            "retention_sets": {"prose": {"rows": 9, "kl": 0.5}},
            "task": {"loss": 1},
        }

    found = together({0: scores("oui", " oui", "non"), 3: scores("Paris", "Rome", "Paris")})
    assert {count: own["common"][0] for count, own in found["retention"]["generation"].items()} == {
        "0": ("oui", 2), "3": ("Paris", 2)
    }  # fmt: skip
    point = {"alpha": 1, "task": {"loss": 1.5}, "retention": {"asked": found["retention"], "prose": {"kl": 0.5}}}
    line = {"label": "sft", "learning_rate": 1e-4, "base": point, "by_alpha": [point], "switched": {"row": point}}
    shown = written_table([line | {"general_text": ["prose"]}])
    assert (
        shown.count("| 50.0 ± 40.0") == 6 and shown.count("asked: 'oui' (2)") == 3 and "| SFT, switch by row" in shown
    )


def test_the_short_answers_numbers_are_those_of_the_results() -> None:
    lines = [line for line in read_lines(ROOT / "recipes/study/results.jsonl") if line["grid"] == "translation.yaml"]
    points = over_seeds([point(line, place) for line in lines for place in line["by_alpha"]])
    known = {(f"{p['loss']:.3f}", f"{p['text']:+.3f}", f"{p['sets']['winowhy']:+.2f}") for p in points}
    section = (ROOT / "recipes/study/README.md").read_text().partition("## In short")[2].partition("\n## ")[0]
    shown = re.findall(r"(\d\.\d{3}) at (.\d\.\d{3}),(?: winowhy)? (.\d\.\d\d)", section.replace("−", "-"))
    assert len(shown) >= 10 and set(shown) <= known and f"**{len(lines)} runs" in section
    assert f"From {len(lines)} runs" in (ROOT / "README.md").read_text()
