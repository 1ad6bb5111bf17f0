"""Runs a grid of training runs and scores, one after the other; resumes where it was stopped.

    python recipes/study/run.py GRID [--only "sft" | --only "sft 5e-05 seed 0"] [--seeds 0,1,2] [--alphas 0.25,0.5,1]
                                     [--work FOLDER] [--keep]

GRID is a YAML file such as recipes/study/translation.yaml (grid.py says what stands in it). Each cell is trained,
consolidated and scored at each α; then one line of JSON goes into `results.jsonl` beside GRID, and its checkpoints are
removed (unless `--keep`: `rank` and `effective-rank` read them). `--only` names a row, or one cell of it. A cell that
has a line is run again only if `--only` names it; it is scored at its earlier α and the grid's, or at `--alphas`, and
its new line replaces the old one. Stopped in the middle of a cell, a study resumes from the cell's last checkpoint;
preempted (SIGTERM or SIGUSR1), it makes one first and exits with 75, as `train` does. Several studies may run side by
side in one work folder, one for each GPU (on a cluster `STUDY=GRID slurm/sweep.sh`): each skips the cells that another
is running.
"""

import contextlib
import json
import os
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import switched
import written
from commands import arguments, grow
from filelock import FileLock, Timeout
from grid import Cell, cells, read_grid
from lines import scaled_by_depth
from xxhash import xxh3_64_hexdigest

from grow.checkpoint.files import write_json, write_text
from grow.checkpoint.run_folder import last_checkpoint
from grow.checkpoint.shards import read_json
from grow.cli.arguments import number, run_script
from grow.data.of_recipe import sliced
from grow.errors import UserError
from grow.methods import read_recipe

WATCHED = ("step", "eval_loss", "eval_accuracy", "retention", "kl_from_base")


class Study:
    """Runs a grid; knows its results and its work folder."""

    def __init__(self, path: Path, work: Path, alphas: str = "", keep: bool = False):
        self.path, self.work, self.keep = path, work, keep
        self.grid = read_grid(path)
        self.alphas = alphas
        self.recipe = str((path.parent / self.grid["recipe"]).resolve())
        self.results = path.parent / "results.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        settings = read_recipe(self.recipe, self.grid["fields"])
        self.base, self.retention = settings.base, Path(sliced(settings.retention or "")[0]).name

    def lock(self, name: str) -> FileLock:
        """Returns a lock for what several runners share, which one of them holds while it makes that."""
        return FileLock(self.work / f"{name}.lock".replace("/", "_"))

    def done(self) -> dict[str, list[float]]:
        """Returns the cells that have a result, by name, and at which α."""
        lines = map(json.loads, self.results.read_text().splitlines() if self.results.exists() else [])
        mine = (line for line in lines if line["grid"] == self.path.name)
        return {line["cell"]: [scores["alpha"] for scores in line.get("by_alpha") or line["dial"]] for line in mine}

    def places(self, cell: Cell) -> str:
        """Returns the α at which a cell is scored, with commas."""
        if not cell.is_between:
            return "1"
        alphas = {*map(float, self.grid["alphas"]), *self.done().get(cell.name, ())}
        return self.alphas or ",".join(f"{alpha:g}" for alpha in sorted(alphas))

    def note(self, line: dict[str, Any]) -> None:
        """Puts a cell's line into the results, in place of an older one if there is one."""
        with self.lock("results"):
            lines = self.results.read_text().splitlines() if self.results.exists() else []
            same = [(old["grid"], old["cell"]) == (line["grid"], line["cell"]) for old in map(json.loads, lines)]
            lines = [text for text, again in zip(lines, same, strict=True) if not again]
            write_text(self.results, "\n".join([*lines, json.dumps(line)]) + "\n")

    def fields(self, **more: Any) -> list[str]:
        """Returns the grid's fields and `more` as arguments. What grows is a cell's, not the recipe's."""
        return arguments({"attention": ""} | self.grid["fields"] | more)

    def base_scores(self) -> Path:
        """Returns the file of the base's scores, made once for each choice of what is scored."""
        asked = [self.grid[key] for key in ("recipe", "fields", "limit", "retention_limit")]
        scored = json.dumps([*asked, *([self.grid["shots"]] if "shots" in self.grid else [])])
        out = self.work / f"base-{xxh3_64_hexdigest(scored.encode())}.json"
        with self.lock("base"):
            if not out.exists():
                self.score(self.base, out)
        return out

    def score(self, checkpoint: str | Path, out: Path, *more: str, write: bool = True) -> None:
        """Runs `eval` on a checkpoint, unless a cell that was stopped has done so; `write` says whether what the model
        writes is scored, if the grid wants that."""
        if out.exists():
            return
        quick = {} if write or self.grid["fields"].get("metric") != "chrf" else {"metric": "loss"}
        shots = self.grid.get("shots", [])
        parts = {count: out.with_name(f"{out.name}-{count}-shots") for count in shots}
        for count, part in parts.items() or [(0, out)]:
            answers = [f"--generate={written.TOKENS}", f"--shots={count}"] if shots else []
            if not part.exists():
                grow(
                    "eval", checkpoint, "--recipe", self.recipe, "--out", part, f"--limit={self.grid['limit']}",
                    f"--retention-limit={self.grid['retention_limit']}", *self.fields(**quick), *more, *answers,
                )  # fmt: skip
        if parts:
            write_json(out, written.together({count: read_json(part) for count, part in parts.items()}))

    def start(self, cell: Cell) -> Path:
        """Returns the checkpoint that the cell's training starts from: the base, or the base grown."""
        if not cell.layers:
            return Path(self.base)
        words = ["grown", cell.layers.replace("/", "_"), str(cell.factor), *cell.attention.split()]
        more = [*chain(*zip(("--attention", "--attention-layers"), cell.attention.split(), strict=False))]
        if cell.copies_from:
            copies = self.folder(cell.copies_from, "-trained")
            words, more = [*words, copies.name], [*more, "--copies-from", str(copies)]
        grown = self.work / "-".join(words)
        with self.lock(grown.name):
            if not grown.exists():
                grow("expand", self.base, grown, "--layers", cell.layers, f"--factor={cell.factor}", *more)
        return grown

    def run(self, cell: Cell) -> None:
        """Trains and scores one cell, and adds its line to the results before its checkpoints are removed."""
        against, start = self.base_scores(), self.start(cell)
        run, trained, out = (self.folder(cell.name, end) for end in ("", "-trained", "-scores"))
        if not run.exists():  # else a cell that was stopped is resumed, and has scores already
            for end in ("", *(f"-{kind}" for kind in cell.switches)):
                self.folder(cell.name, f"{end}-scores").unlink(missing_ok=True)
        fields = self.fields(**cell.fields, switch=cell.switches[0] if cell.switches else "")
        if cell.switches:
            switched.put(self, cell, run, cell.switches[0])
        grow(
            "train", self.recipe, *fields, f"--method={cell.method}", f"--seed={cell.seed}",
            f"--learning_rate={cell.learning_rate}", f"--average={cell.average}", "--output_dir", run,
            *(("--grown", start) if cell.layers else ()),
        )  # fmt: skip
        if cell.is_ranked:
            grow("rank", run, "--out", f"{run}-ranking")
        if self.ranked(cell):
            grow("effective-rank", run, "--out", f"{run}-ranks")
        base_inside = bool(cell.layers)
        if not cell.layers and (cell.switches or not cell.merges):
            trained, base_inside = run / "result", True  # its LoRAs are not merged
        if not trained.exists():
            form = ("--format", "grown") if cell.layers else ()
            grow("consolidate", run, trained, *form)
        scored = self.by_layer(cell, trained)
        options = [f"--alpha={self.places(cell)}", f"--against={against}"]
        options += ["--switch=on"] if cell.switches else [] if base_inside else [f"--start={self.base}"]
        self.score(scored, out, *options, write=cell.write and not cell.switches)
        line = self.line(cell, run, scored, read_json(against), read_json(out))
        line["switched"] = switched.scores(self, cell, run, trained)
        self.note(line)
        for left in () if self.keep else dict.fromkeys((scored, trained, run)):
            remove(left)

    def folder(self, name: str, end: str = "") -> Path:
        """Returns where a cell, by its name, has its run, or what is called by the `end`."""
        return self.work / f"{name}{end}".replace(" ", "-")

    def ranked(self, cell: Cell) -> bool:
        """Says whether the grid wants this cell's effective ranks."""
        return cell.name in self.grid.get("effective_rank", ())

    def by_layer(self, cell: Cell, trained: Path) -> Path:
        """Returns the checkpoint with an α for each layer, or scaled with depth, if the cell wants that; else the one
        given."""
        if cell.lines is not None:
            if not (scaled := trained.with_name(f"{trained.name}-lines")).exists():
                scaled_by_depth(self.base, trained, scaled, cell.lines)
            return scaled
        if not cell.learn_alphas:
            return trained
        out = trained.with_name(f"{trained.name}-by-layer")
        if not out.exists():
            grow("learn-alphas", trained, out, "--recipe", self.recipe, *arguments(cell.learn_alphas))
        return out

    def line(self, cell: Cell, run: Path, scored: Path, base: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Returns a cell's line in the results."""
        facts = read_json(run / "run.json")
        ranking = read_json(Path(f"{run}-ranking", "ranking.json"))["figures"] if cell.is_ranked else []
        history = read_json(last_checkpoint(run) / "trainer_state.json")["log_history"]
        # Keyed by step: a run that resumes validates again at the step that it resumes from.
        watched = {e["step"]: {key: e[key] for key in WATCHED if key in e} for e in history if "eval_loss" in e}
        points = [self.point(scores) for scores in written.points(result)]
        reported = points[-1]["retention"]
        alphas = ",".join(f"{scores['alpha']:g}" for scores in points)
        return {
            "grid": self.path.name,
            "cell": cell.name,
            **{key: value for key, value in vars(cell).items() if key != "learn_alphas"},
            "learnt_alphas": read_json(scored / "config.json")["growth"]["alphas"] if cell.learn_alphas else [],
            "max_steps": self.grid["fields"]["max_steps"],
            **{key: facts[key] for key in ("trained_parameters", "git_commit", "dtype", "device")},
            "command": f"python recipes/study/run.py recipes/study/{self.path.name} "
            f'--only "{cell.name}" --alphas {alphas}',
            "general_text": self.grid.get("general_text", []),
            "history": list(watched.values()),
            "base": self.point(base),
            "by_alpha": points,
            **{key: {name: own[key] for name, own in reported.items() if key in own} for key in ("kl", "identical")},
            "updates": {str(row["layer"]): row["norm"]["mean"] for row in ranking},
            "effective_rank": effective_ranks(Path(f"{run}-ranks")) if self.ranked(cell) else [],
        }

    def point(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Returns the part of the scores at one α that a line keeps: no single rows."""
        sets = {self.retention: scores["retention"], **scores.get("retention_sets", {})}
        keys = ("loss", "log_likelihood", "exact_match", "rows", "from_base", "kl", "identical", "opened", "generation")
        kept = {name: {key: known[key] for key in keys if key in known} for name, known in sets.items()}
        for name, known in kept.items():
            if "kl" in known:
                known["kl_interval"] = sets[name]["intervals"]["kl"]
        shown = ("loss", "token_accuracy", "accuracy", "chrf", "bleu", "rows", "intervals", "kl", "identical", "opened")
        task = {key: scores["task"][key] for key in shown if key in scores["task"]}
        return {"alpha": scores["alpha"], "task": task, "retention": kept}


def effective_ranks(folder: Path) -> list[dict[str, Any]]:
    """Returns the part of the result of `effective-rank` that a line keeps: each matrix's ranks, and those of noise."""
    kept = []
    for found in read_json(folder / "effective_rank.json")["updates"]:
        same = {key: found[key] for key in ("layer", "matrix")} | {"rounding": {"ratio": found["rounding"]["ratio"]}}
        same |= {"random": {key: found["random"][key] for key in ("effective_rank", "stable_rank")}}
        kept.append(same | {key: found[key] for key in ("effective_rank", "stable_rank")})
    return kept


def remove(folder: Path) -> None:
    """Removes a folder, renamed first: a later run of the cell would take a folder that is half removed for whole."""
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def study(grid: str, only: str = "", seeds: str = "", alphas: str = "", work: str = "", keep: bool = False) -> None:
    """Runs the cells of a grid that have no result yet; see the top of this file."""
    cache = Path(os.environ.setdefault("GROW_CACHE", os.path.expanduser("~/.cache/grow")))
    path = Path(grid).resolve()
    for alpha in alphas.split(",") if alphas else ():
        number("--alphas", alpha, float)
    runner = Study(path, Path(work) if work else cache / "study" / path.stem, alphas, keep)
    seed = only.partition(" seed ")[2]  # a cell's name ends with it
    named = [number("--seeds", one) for one in (seeds or seed).split(",") if one]
    wanted = [cell for cell in cells(runner.grid, named or runner.grid["seeds"]) if only in ("", cell.label, cell.name)]
    if not wanted:
        raise UserError(f'{grid}: has no row and no cell {only!r}; a cell is called like "sft 5e-05 seed 0"')
    for place, cell in enumerate(wanted, 1):
        with contextlib.suppress(Timeout), runner.lock(cell.name).acquire(blocking=False):
            if only == cell.name or cell.name not in runner.done():
                print(f"== {place} of {len(wanted)}: {cell.name}", file=sys.stderr, flush=True)
                runner.run(cell)


if __name__ == "__main__":
    run_script(study, str(__doc__))
