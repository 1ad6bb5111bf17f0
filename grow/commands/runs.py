"""Commands on recipes and runs.

Heavy imports happen inside a command, so that --help answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Any

from grow.arguments import number
from grow.errors import Fault, UserError, unknown
from grow.text import eval_text, say, train_text


def fetch(recipe: str, json: bool = False, **fields: str) -> str:
    """Fetches a recipe's model and data into the cache; started by launch/prepare.sh, where there is network.

    Example: HF_TOKEN=… launch/prepare.sh recipes/gemma3_1b/translation.yaml

    Args:
        recipe: A YAML file.
        json: Print one JSON object.
        fields: Fields of the recipe that are given another value.
    """
    from grow.recipe import read_recipe

    settings = read_recipe(recipe, fields)

    from grow.data.fetch import fetch as run

    return say(run(settings), lambda r: f"model: {r['base']}\ndata: {r['data']}, rows {r['rows']}", json)


def preview(recipe: str, split: str = "", limit: str = "5", json: bool = False, **fields: str) -> str:
    """Shows what a run would train on, row by row: the text, what of it is learnt, bad rows and why they are.

    Example: python -m grow preview recipes/gemma3_270m/translation.yaml --limit 3
    Example: python -m grow preview my.yaml --split validation --messages conversations --json

    Args:
        recipe: A YAML file. Any of its fields can be given another value: --field value.
        split: Which split of the data; the recipe's train_split unless given.
        limit: So many rows from the first on; 0 is all.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.recipe import read_recipe

    settings = read_recipe(recipe, fields)

    from grow.data.preview import checked_limit, preview_text
    from grow.data.preview import preview as run
    from grow.training.run_file import first_day

    settings = settings.on(first_day(Path(settings.output_dir)))
    result = run(settings, split or settings.train_split, checked_limit(number("--limit", limit)))
    return say(result, lambda r: preview_text(r, colour=sys.stdout.isatty()), json)


def show(recipe: str, *names: str, json: bool = False, **fields: str) -> str:
    """Prints what fields of a recipe come to, one a line, for scripts: `grows` says whether its method starts grown.

    Example: python -m grow show recipes/gemma3_270m/translation.yaml output_dir grown --method g_train

    Args:
        recipe: A YAML file. Any of its fields can be given another value: --field value.
        names: The fields.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.recipe import read_recipe

    settings = read_recipe(recipe, fields)
    values = settings.values() | {"start": settings.start, "grows": settings.make_method().grows}
    values["base"] = settings.base_name
    for name in names:
        if name not in values:
            raise UserError(unknown(name, values, "field"))
    return say({name: values[name] for name in names}, lambda r: "\n".join(map(str, r.values())), json)


def train(recipe: str, check: bool = False, json: bool = False, **fields: str) -> str:
    """Trains as a recipe says; started by launch/train.sh, which starts the ranks. Started again, it goes on.

    Example: launch/train.sh recipes/gemma3_270m/translation.yaml --method sft --max_steps 20

    Args:
        recipe: A YAML file; recipes/ has some. Any of its fields can be given another value: --field value.
        check: Only check that all it needs is there, for WORLD_SIZE ranks, and print the run's folder.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.recipe import read_recipe
    from grow.training.train import check_all
    from grow.training.train import train as run

    settings = read_recipe(recipe, fields)
    if check:
        check_all(settings)
        return say({"run": settings.output_dir}, lambda r: r["run"], json)
    result = run(settings)
    return say(result, train_text, json) if os.environ.get("RANK", "0") == "0" else ""


def eval(
    checkpoint: str, recipe: str = "", alpha: str = "1", start: str = "", against: str = "", samples: str = "0",
    limit: str = "0", retention_limit: str = "0", lm_eval: str = "", include_path: str = "", name: str = "",
    out: str = "", json: bool = False, **fields: str,
) -> str:  # fmt: skip
    """Scores a checkpoint on the recipe's test rows and on what the base knew, with 95 % intervals; over the dial too.

    Example: python -m grow eval ~/models/gemma-3-270m-french --recipe recipes/gemma3_270m/translation.yaml
    Example: python -m grow eval runs/sft-stock --start BASE --alpha 0,0.5,1 --recipe recipes/gemma3_270m/maths.yaml
    Example: python -m grow eval runs/sft-stock --lm-eval winogrande,arc_easy

    Args:
        checkpoint: A stock or a grown checkpoint, or what a run by `adapter` ends in (RUN/result).
        recipe: The recipe whose task and retention rows are scored. Any of its fields can be given another value.
        alpha: The dial, 0 is the base, 1 as trained; or several places of it, with commas.
        start: The base of a stock checkpoint, for the dial: weights are interpolated.
        against: A file of the base's scores, to compare old knowledge with row by row; or have 0 among the α.
        samples: For how many test rows to show what the model writes.
        limit: Score only so many test rows (of each task of lm-eval, too); 0 is all.
        retention_limit: Likewise, of each set of old knowledge.
        lm_eval: Tasks of lm-evaluation-harness, with commas.
        include_path: A folder of more such tasks.
        name: What to call it in a report; the folder's name unless given.
        out: Write the result to this file, for `report`.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.checkpoint.shards import read_json
    from grow.recipe import read_recipe

    if not recipe and not lm_eval:
        raise UserError("eval: name what to score it on: --recipe FILE, or --lm-eval TASK,TASK")
    settings = read_recipe(recipe, fields) if recipe else None
    most, most_known, shown = (
        number(flag, value)
        for flag, value in (("--limit", limit), ("--retention-limit", retention_limit), ("--samples", samples))
    )
    dial = tuple(number("--alpha", part, float) for part in alpha.split(","))
    base = read_json(Path(against)) if against else None

    from grow.evaluation.evaluate import evaluate
    from grow.evaluation.harness import Harness
    from grow.tables import write_json

    harness = Harness(lm_eval.split(","), include_path, most or None).scores if lm_eval else None
    result = evaluate(checkpoint, settings, dial, shown, most or None, most_known or None, start, base, harness)
    result["name"] = name or os.path.basename(checkpoint.rstrip("/"))
    if out:
        write_json(out, result)
    said = say(result, eval_text, json)
    _raise_failed(result, said, out)
    return said


def _raise_failed(result: dict[str, Any], said: str, out: str) -> None:
    """Of a result of which a part failed: says what is there, and raises UserError or Fault for what is not."""
    failed = [entry for point in result.get("dial", [result]) for entry in point.get("failed", {}).items()]
    if failed:
        print(said)
        parts = "; ".join(f"{part}: {why['line']}" for part, why in failed)
        kind = UserError if all(why["mistake"] for _, why in failed) else Fault
        raise kind(f"eval: {parts} (all else is scored{', and in ' + out if out else ''})")


def report(*runs: str, out: str, json: bool = False) -> str:
    """Makes a table and a plot of runs (their curves) and of files that `eval --out` wrote (their scores).

    Example: python -m grow report base.json sft.json runs/sft --out results
    Example: python -m grow report recipes/study/results.jsonl --out results

    Args:
        runs: Training runs, and files of scores; or the results of a study, alone.
        out: The folder for report.md and report.png, or study.md and each grid's pictures.
        json: Print one JSON object.
    """
    from grow.analysis.study import study_report
    from grow.report import report as run

    if not runs:
        raise UserError("report: name at least one run, or a file that `eval --out` wrote")
    study = any(name.endswith(".jsonl") for name in runs)
    if study and len(runs) > 1:
        raise UserError("report: the results of a study are reported alone; runs of different size are not mixed")
    result = study_report(Path(runs[0]), out) if study else run(runs, out)
    return say(result, lambda r: f"{r['text']}\nwritten: {', '.join([r['table'], *r['plots']])}", json)
