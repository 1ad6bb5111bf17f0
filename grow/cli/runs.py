"""Commands on recipes and runs.

Heavy imports happen inside a command, so that --help answers at once.
"""

import os
import sys
from pathlib import Path

from grow.cli.arguments import number
from grow.cli.format import Bar, say, train_text
from grow.errors import UserError, unknown
from grow.parts import FIELDS


def fetch(recipe: str, json: bool = False, **fields: str) -> str:
    """Fetches a recipe's model and data into the cache; started by launch/prepare.sh, where there is network.

    Example: HF_TOKEN=… launch/prepare.sh recipes/gemma3_1b/translation.yaml

    Args:
        recipe: A YAML file.
        json: Print one JSON object.
        fields: Fields of the recipe that are given another value.
    """
    from grow.methods import read_recipe

    settings = read_recipe(recipe, fields)

    from grow.data.fetch import fetch as run

    return say(run(settings), lambda r: f"model: {r['base']}\ndata: {r['data']}, rows {r['rows']}", json)


def preview(recipe: str, split: str = "", limit: str = "5", json: bool = False, **fields: str) -> str:
    """Shows what a run would train on, row by row: the text, what of it is learnt, bad rows and why they are bad.

    Example: grow preview recipes/gemma3_270m/translation.yaml --limit 3
    Example: grow preview my.yaml --split validation --messages conversations --json

    Args:
        recipe: A YAML file, or a run. Any of its fields can be given another value: --field value.
        split: Which split of the data; the recipe's train_split unless given.
        limit: How many rows, from the first on; 0 is all.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.methods import read_recipe

    settings = read_recipe(recipe, fields)

    from grow.data.preview import checked_limit, preview_text
    from grow.data.preview import preview as run
    from grow.training.run_file import first_day

    settings = settings.on(first_day(Path(settings.output_dir)))
    result = run(settings, split or settings.train_split, checked_limit(number("--limit", limit)))
    return say(result, lambda r: preview_text(r, colour=sys.stdout.isatty()), json)


def show(recipe: str, *names: str, json: bool = False, **fields: str) -> str:
    """Prints what fields of a recipe come to, one a line, for scripts.

    Beside the fields there are `grows` (its method starts grown), `plans_growth` (it says what grows), `growth` (the
    flags of `grow expand`), `growth_defaults` (the fields for what grows beside MLPs, as if nothing did).

    Example: grow show recipes/gemma3_270m/translation.yaml output_dir grown --method g_train

    Args:
        recipe: A YAML file, or a run. Any of its fields can be given another value: --field value.
        names: The fields; all of them, with their names, unless given.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.methods import read_recipe

    settings = read_recipe(recipe, fields)
    if not names:
        return say(settings.values(), lambda r: "\n".join(f"{name}: {value}" for name, value in r.items()), json)
    values = settings.values() | {"start": settings.start, "grows": settings.make_method().grows}
    values |= {"base": settings.base_name, "plans_growth": settings.plans_growth}
    values["growth"] = "\n".join(settings.growth_flags)
    values["growth_defaults"] = "\n".join(f"--{name}={spec.default}" for name, spec in FIELDS.items())
    for name in names:
        if name not in values:
            raise UserError(unknown(name, values, "field"))
    return say({name: values[name] for name in names}, lambda r: "\n".join(map(str, r.values())), json)


def train(recipe: str, check: bool = False, expand: bool = False, json: bool = False, **fields: str) -> str:
    """Trains as a recipe says; started by launch/train.sh, which starts the ranks. Started again, it resumes.

    Example: launch/train.sh recipes/gemma3_270m/translation.yaml --method sft --max_steps 20

    Args:
        recipe: A YAML file; recipes/ has some; or a run, which goes on. Any of its fields can be given another value:
            --field value.
        check: Only check that all it needs is there, for WORLD_SIZE ranks, and print the run's folder.
        expand: With --check: then make the grown checkpoint in the run's folder, if the recipe names none.
        json: Print one JSON object.
        fields: Fields of the recipe.
    """
    from grow.methods import read_recipe
    from grow.training.quiet import quiet

    settings = read_recipe(recipe, fields)
    with quiet():
        from grow.training.check import check_all
        from grow.training.start import expand_start
        from grow.training.train import train as run
    if expand and not check:
        raise UserError("train: --expand goes with --check")
    if check:
        check_all(settings)
        if expand:
            with Bar("expanding") as bar:
                expand_start(settings, bar.add)
        return say({"run": settings.output_dir}, lambda r: r["run"], json)
    result = run(settings)
    return say(result, train_text, json) if os.environ.get("RANK", "0") == "0" else ""


def fit_switch(
    source: str, on: str = "", off: str = "", layer: str = "auto", kind: str = "", json: bool = False, **fields: str
) -> str:
    """Fits a run's switch, so that its skill acts in rows like the task's and elsewhere the model is its base exactly.

    What decides is a linear classifier of the base's own features, fitted on the task's prompts against text that the
    base writes itself. A recipe's field `switch` does the same before the first step. It lies in RUN/switch.

    Example: grow fit-switch runs/gemma3_270m-translation-g_freeze --off german,french

    Args:
        source: A training run, or a recipe, FILE.yaml, before it or after.
        on: Data sets with the same request in other words, with commas.
        off: Data sets that the skill is to leave alone, with commas: by the recipe's template, if it has their columns.
        layer: The layer that is read; "auto" is the lowest that grew or, if that is in the lowest third, the first
            above, in a first pass over the prompt.
        kind: row, answer or token; the recipe's unless given, else row.
        json: Print one JSON object.
        fields: For a recipe: fields that are given another value.
    """
    from grow.methods import read_recipe

    if not source.endswith((".yaml", ".yml")) and fields:
        raise UserError(f"fit-switch: --{next(iter(fields))} is for a recipe (FILE.yaml), and {source} is a run")
    settings = read_recipe(source, fields)
    kind = kind or (settings.switch if settings.fits_switch else "row")

    from grow.switch.of_recipe import refit

    record = refit(settings, kind, layer, *([name for name in names.split(",") if name] for names in (on, off)))
    return say(record.values(), lambda r: f"written: {settings.output_dir}/switch", json)
