"""python -m grow COMMAND …: growing language models, and training what has grown.

Heavy imports happen inside the command that needs them, so that --help answers at once.
"""

import json as json_module
import os
import sys
from collections.abc import Callable
from typing import Any

from grow.arguments import checked, number
from grow.errors import Fault, Preempted, UserError, one_line, unknown
from grow.text import Bar, eval_text, plan_text, train_text, verify_text


def plan(base: str, factor: str = "2", layers: str = "all", json: bool = False) -> str:
    """Shows what would be grown: layers, parameters added and trained, bytes on disk. Writes nothing.

    Example: python -m grow plan ~/models/gemma-3-1b-pt --layers 0-8

    Args:
        base: The checkpoint to grow: a folder with config.json and safetensors, or a hub name that is in the cache.
        factor: k: every grown MLP becomes k times as wide.
        layers: "all", indices and ranges such as 0,3,7-9, or the best of a ranking: top:6:ranking.json.
        json: Print one JSON object.
    """
    from grow.checkpoint.expand import added_tensors, describe, make_plan
    from grow.checkpoint.shards import Checkpoint

    checkpoint = Checkpoint(base)
    grown, prefixes = make_plan(checkpoint, factor, layers)
    return _say(describe(checkpoint, grown, added_tensors(checkpoint, grown, prefixes)), plan_text, json)


def expand(
    base: str, out: str, factor: str = "2", layers: str = "all", max_shard_size: str = "1GB", json: bool = False
) -> str:
    """Grows a checkpoint, offline: base shards linked, added copies streamed; no model is built.

    Example: python -m grow expand ~/models/gemma-3-1b-pt ~/models/gemma-3-1b-grown

    Args:
        base: The checkpoint to grow: a folder with config.json and safetensors, or a hub name that is in the cache.
        out: The grown checkpoint; must not exist yet.
        factor: k: every grown MLP becomes k times as wide.
        layers: "all", indices and ranges such as 0,3,7-9, or the best of a ranking: top:6:ranking.json.
        max_shard_size: The largest file of growth, such as 1GB.
        json: Print one JSON object.
    """
    from grow.checkpoint.expand import expand as run

    with Bar("expanding") as bar:
        result = run(base, out, factor, layers, max_shard_size, bar.add)
    return _say(result, lambda r: f"{plan_text(r)}\nwritten: {r['out']}", json)


def verify(checkpoint: str, base: str | None = None, forward: bool = False, json: bool = False) -> str:
    """Checks a checkpoint: files and tensors intact, growth where its plan says, the base unharmed inside.

    Example: python -m grow verify grown --base ~/models/gemma-3-1b-pt --forward

    Args:
        checkpoint: A grown or a stock checkpoint.
        base: Also compare every tensor with this base's.
        forward: Also run both models and compare every logit, in fp32 and in bf16 (needs --base).
        json: Print one JSON object.
    """
    from grow.checkpoint.verify import verify as run

    if forward and base is None:
        raise UserError("--forward compares with a base: name it with --base")
    result = run(checkpoint, base)
    if forward and not result["problems"]:
        from grow.forward import compare

        result["logits"] = compare(checkpoint, str(base))
        # What cannot be exact, k > 2 and fp16 (halving loses bits of its subnormals), is measured and stated.
        allowed = 0.0 if result["exact"] else 0.02
        result["problems"] += [
            f"{name}: logits differ by up to {found['difference']:.3g}"
            for name, found in result["logits"].items()
            if not found["difference"] <= allowed * found["largest"]
        ]
    if result["problems"]:
        raise UserError(f"{checkpoint}: {len(result['problems'])} problems: " + "; ".join(result["problems"][:5]))
    return _say(result, verify_text, json)


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
    from grow.train import check_run
    from grow.train import train as run

    settings = read_recipe(recipe, fields)
    if check:
        check_run(settings)
        return _say({"run": settings.output_dir}, lambda r: r["run"], json)
    result = run(settings)
    return _say(result, train_text, json) if os.environ.get("RANK", "0") == "0" else ""


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
    for name in names:
        if name not in values:
            raise UserError(unknown(name, values, "field"))
    return _say({name: values[name] for name in names}, lambda r: "\n".join(map(str, r.values())), json)


def consolidate(
    source: str, out: str, format: str = "stock", uniform: bool = False, alpha: str = "1", dtype: str = "",
    max_shard_size: str = "", start: str = "", tag: str = "", scores: str = "", json: bool = False,
) -> str:  # fmt: skip
    """Makes a checkpoint of what was trained: one that loads anywhere, or (--format grown) one that is still grown.

    Example: python -m grow consolidate runs/gemma3_270m-translation-g_freeze ~/models/gemma-3-270m-french

    Args:
        source: A training run, one of its checkpoint-N folders, any DeepSpeed checkpoint, or a grown checkpoint.
        out: The checkpoint to write; must not exist yet.
        format: "stock", or "grown".
        uniform: Where only some layers are grown, widen the others with zeros, so that one width holds for all.
        alpha: The dial, folded into the weights: 0 is the base, 1 as trained.
        dtype: float32, bfloat16 or float16; the base's unless given.
        max_shard_size: The largest file, such as 500MB; 5GB unless given, 1GB of growth.
        start: What training started from, where no run.json says it.
        tag: Which of several checkpoints in a DeepSpeed folder; its `latest` unless given.
        scores: A file that `eval --out` wrote, for the model card.
        json: Print one JSON object.
    """
    from grow.checkpoint.consolidate import consolidate as run

    dial = number("--alpha", alpha, float)
    with Bar("consolidating") as bar:
        result = run(source, out, format, uniform, dial, dtype, max_shard_size, start, tag, scores, bar.add)
    return _say(result, lambda r: f"{r['format']} checkpoint of {r['bytes'] / 1e9:.2f} GB written: {r['out']}", json)


def base(source: str, out: str, json: bool = False) -> str:
    """Takes the base model out of a grown checkpoint: the same files, by checksum, as were grown.

    Example: python -m grow base ~/models/gemma-3-1b-grown ~/models/gemma-3-1b-again

    Args:
        source: A grown checkpoint, or a run that started from one.
        out: The base; must not exist yet.
        json: Print one JSON object.
    """
    from grow.checkpoint.package import base as run

    return _say(run(source, out), lambda r: f"base of {len(r['files'])} shards written: {r['out']}", json)


def growth(source: str, out: str, start: str = "", tag: str = "", json: bool = False) -> str:
    """Takes the growth alone, without the base: some hundreds of MB, which `attach` puts on the base again.

    Example: python -m grow growth runs/gemma3_270m-translation-g_freeze ~/models/french-growth

    Args:
        source: A training run, one of its checkpoint-N folders, any DeepSpeed checkpoint, or a grown checkpoint.
        out: The growth package; must not exist yet.
        start: What training started from, where no run.json says it.
        tag: Which of several checkpoints in a DeepSpeed folder; its `latest` unless given.
        json: Print one JSON object.
    """
    from grow.checkpoint.package import growth as run

    with Bar("writing") as bar:
        result = run(source, out, start=start, tag=tag, progress=bar.add)
    return _say(result, lambda r: f"growth of {r['bytes'] / 1e9:.2f} GB written: {r['out']}", json)


def attach(base: str, growth: str, out: str, json: bool = False) -> str:
    """Puts a growth package on the base that it grew from; another base is refused.

    Example: python -m grow attach ~/models/gemma-3-1b-pt ~/models/french-growth ~/models/gemma-3-1b-french

    Args:
        base: The base, by folder or by hub name.
        growth: The growth package.
        out: The grown checkpoint; must not exist yet.
        json: Print one JSON object.
    """
    from grow.checkpoint.package import attach as run

    return _say(run(base, growth, out), lambda r: f"grown checkpoint written: {r['out']}", json)


def eval(
    checkpoint: str, recipe: str, alpha: str = "1", samples: str = "0", limit: str = "0",
    name: str = "", out: str = "", json: bool = False,
) -> str:  # fmt: skip
    """Scores a checkpoint on the recipe's test rows and on what the base knew.

    Example: python -m grow eval ~/models/gemma-3-270m-french --recipe recipes/gemma3_270m/translation.yaml

    Args:
        checkpoint: A stock or a grown checkpoint.
        recipe: The recipe whose task and retention rows are scored.
        alpha: The dial of a grown checkpoint: 0 is its base, 1 as trained.
        samples: For how many test rows to show what the model writes.
        limit: Score only so many test rows; 0 is all.
        name: What to call it in a report; the folder's name unless given.
        out: Write the result to this file, for `report`.
        json: Print one JSON object.
    """
    from grow.recipe import read_recipe

    settings = read_recipe(recipe)
    numbers = {key: number(f"--{key}", value) for key, value in (("samples", samples), ("limit", limit))}
    dial = number("--alpha", alpha, float)

    from grow.evaluate import evaluate

    result = evaluate(checkpoint, settings, dial, numbers["samples"], numbers["limit"] or None)
    result["name"] = name or os.path.basename(checkpoint.rstrip("/"))
    if out:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        with open(out + ".partial", "w", encoding="utf-8") as file:
            json_module.dump(result, file, indent=2, ensure_ascii=False)
        os.replace(out + ".partial", out)
    return _say(result, eval_text, json)


def report(*runs: str, out: str, json: bool = False) -> str:
    """Makes a table and a plot of runs (their curves) and of files that `eval --out` wrote (their scores).

    Example: python -m grow report base.json sft.json runs/sft --out results

    Args:
        runs: Training runs, and files of scores.
        out: The folder for report.md and report.png.
        json: Print one JSON object.
    """
    from grow.report import report as run

    if not runs:
        raise UserError("report: name at least one run, or a file that `eval --out` wrote")
    return _say(run(runs, out), lambda r: f"{r['text']}\nwritten: {r['table']}, {r['plot']}", json)


COMMANDS: dict[str, Callable[..., str]] = {
    command.__name__: command
    for command in (plan, expand, verify, show, train, consolidate, base, growth, attach, eval, report)
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line. Returns the exit code: 0 done, 2 a user's mistake, 75 preempted, 1 a fault."""
    import fire

    try:
        command = checked(sys.argv[1:] if arguments is None else arguments, COMMANDS)
        fire.Fire(COMMANDS, command=command, name="grow")
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and command[0] == "train":
            raise  # elsewhere it is the disk, or the network before it; here it could be anything
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same
            print(f"grow: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Fault as error:
        print(f"grow: {one_line(error)}", file=sys.stderr)
        return 1
    except Preempted as left:
        if os.environ.get("RANK", "0") == "0":
            print(f"grow: {one_line(left)}", file=sys.stderr)
        return 75
    except SystemExit as leaving:  # Fire's help
        return int(leaving.code or 0)
    return 0


def _say(result: dict[str, Any], text: Callable[[dict[str, Any]], str], json: bool) -> str:
    return json_module.dumps(result) if json else text(result)
