"""Commands on checkpoints: offline, no model is built.

Heavy imports happen inside a command, so that --help answers at once.
"""

import os
from shlex import quote
from typing import Any

from grow.cli.arguments import number, with_flags
from grow.cli.format import Bar, memory_text, plan_text, say, verify_text
from grow.errors import UserError
from grow.parts import FIELDS


@with_flags(FIELDS)
def plan(
    source: str, factor: str | None = None, layers: str | None = None, world_size: str = "1", gpu: str = "",
    json: bool = False, **fields: Any,
) -> str:  # fmt: skip
    """Shows what would be grown: layers, parameters added and trained, bytes on disk. Writes nothing.

    For a recipe, shows what its run would take on each of --world-size GPUs, and on disk. What is said of growth then
    replaces what the recipe says.

    Example: grow plan ~/models/gemma-3-1b-pt --layers 0-8
    Example: grow plan recipes/gemma3_4b/translation.yaml --world-size 8 --gpu 80GB --method sft

    Args:
        source: The checkpoint to grow: a folder with config.json and safetensors, or a hub name that is in the
            cache; or a recipe, FILE.yaml.
        factor: k: every grown MLP becomes k times as wide; 2 unless given.
        layers: "all", "upper" (above a third of the depth), 0,3,7-9, or top:6:FILE, the best of a ranking or of what
            learn-alphas wrote; "all" if nothing else is to grow.
        world_size: For a recipe: how many GPUs.
        gpu: For a recipe: the memory of one, such as 80GB, to be told what fits.
        json: Print one JSON object.
        fields: For a recipe: fields that are given another value.
    """
    growth = {name: fields.pop(name) for name in FIELDS if name in fields}
    growth |= {name: value for name, value in (("factor", factor), ("layers", layers)) if value is not None}
    if source.endswith((".yaml", ".yml")):
        from grow.checkpoint.writer import parse_size
        from grow.methods import read_recipe
        from grow.training.footprint import describe_run

        memory = parse_size("--gpu", gpu) if gpu else 0
        if 0 < memory < 10**8:
            raise UserError(f"--gpu {gpu}: is less than 100MB; write a GPU's memory with its unit, such as 80GB")
        settings = read_recipe(source, fields | growth)
        return say(describe_run(settings, number("--world-size", world_size), memory), memory_text, json)
    if gpu:
        raise UserError(f"plan: --gpu is for a recipe (FILE.yaml), and {source} is a checkpoint")
    if fields:
        raise UserError(f"plan: --{next(iter(fields))} is for a recipe (FILE.yaml), and {source} is a checkpoint")

    from grow.checkpoint.copies import added_tensors
    from grow.checkpoint.expand import describe_growth
    from grow.checkpoint.growable import make_plan
    from grow.checkpoint.shards import Checkpoint

    checkpoint = Checkpoint(source)
    grown = make_plan(checkpoint, **growth)
    return say(describe_growth(checkpoint, grown, added_tensors(checkpoint, grown)), plan_text, json)


@with_flags(FIELDS)
def expand(
    base: str, out: str, factor: str = "2", layers: str = "", max_shard_size: str = "1GB", keep: bool = False,
    copies_from: str = "", json: bool = False, **parts: Any,
) -> str:  # fmt: skip
    """Grows a checkpoint, offline: base shards linked, added copies streamed; no model is built.

    Example: grow expand ~/models/gemma-3-1b-pt ~/models/gemma-3-1b-grown
    Example: grow expand ~/models/gemma-3-1b-pt grown --copies-from ~/models/gemma-3-1b-it
    Example: grow expand ~/models/gemma-3-1b-pt grown --attention queries
    Example: grow expand ~/models/gemma-3-4b-pt grown --tower vision --train-projector

    Args:
        base: The checkpoint to grow: a folder with config.json and safetensors, or a hub name that is in the cache.
        out: The grown checkpoint; must not exist yet.
        factor: k: every grown MLP becomes k times as wide.
        layers: "all", "upper" (above a third of the depth), 0,3,7-9, or top:6:FILE, the best of a ranking or of what
            learn-alphas wrote; "none", as it is without this, where something else is to grow.
        max_shard_size: The largest file of growth, such as 1GB.
        keep: An OUT that is there already stays, if it grew in these layers by this factor.
        copies_from: A checkpoint of the same shape, whose MLPs are copied in place of the base's; the start is then the
            mean of both, and the base at α = 0 alone.
        parts: What else grows.
        json: Print one JSON object.
    """
    # On import, numpy would start threads for matrix products, which spin for a while and have nothing to do here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from grow.checkpoint.expand import check_grown
    from grow.checkpoint.expand import expand as run

    growth = {"factor": factor, "layers": layers} | parts
    if keep and os.path.isdir(out):
        there = check_grown(base, out, copies_from, **growth)
        return say(there, lambda r: f"is there already: {r['out']}", json)
    with Bar("expanding") as bar:
        result = run(base, out, max_shard_size, bar.add, copies_from, **growth)
    return say(result, lambda r: f"{plan_text(r)}\nwritten: {r['out']}", json)


def verify(checkpoint: str, base: str | None = None, forward: bool = False, json: bool = False) -> str:
    """Checks a checkpoint: files and tensors intact, growth where its plan says, the base unharmed inside.

    Example: grow verify grown --base ~/models/gemma-3-1b-pt --forward

    Args:
        checkpoint: A grown or a stock checkpoint.
        base: Also compare every tensor with this base's.
        forward: Also run both models and compare every logit, in fp32 and in bf16 (needs --base).
        json: Print one JSON object.
    """
    from grow.checkpoint.verify import verify as run

    if os.path.isfile(os.path.join(checkpoint, "run.json")):
        raise UserError(
            f"{checkpoint}: is a run; make a checkpoint of it first: grow consolidate {quote(checkpoint)} OUT"
        )
    if forward and base is None:
        raise UserError("--forward compares with a base: name it with --base")
    result = run(checkpoint, base)
    if forward and not result["problems"]:
        from grow.evaluation.logits import compare_logits

        alpha = 0.0 if "copies_from" in result or result["trained"] else 1.0
        result["logits"] = compare_logits(checkpoint, str(base), alpha=alpha)
        # What cannot be exact, k > 2 and fp16 (halving loses bits of its subnormals), is measured and stated.
        allowed = 0.0 if result["exact"] else 0.02
        result["problems"] += [
            f"{name}: logits differ by up to {found['difference']:.3g}"
            for name, found in result["logits"].items()
            if "left_out" not in found and not found["difference"] <= allowed * found["largest"]
        ]
    if result["problems"]:
        raise UserError(f"{checkpoint}: {len(result['problems'])} problems: " + "; ".join(result["problems"][:5]))
    return say(result, verify_text, json)


def consolidate(
    source: str, out: str, format: str = "stock", uniform: bool = False, alpha: str = "1", dtype: str = "",
    max_shard_size: str = "", start: str = "", tag: str = "", average: str = "", scores: str = "",
    without_switch: bool = False, for_: str = "", json: bool = False,
) -> str:  # fmt: skip
    """Makes a checkpoint of what was trained: one that loads anywhere, or (--format grown) one that is still grown.

    Example: grow consolidate runs/gemma3_270m-translation-g_freeze ~/models/gemma-3-270m-french

    Args:
        source: A training run, one of its checkpoint-N folders, any DeepSpeed checkpoint, or a grown checkpoint.
        out: The checkpoint to write; must not exist yet.
        format: "stock", or "grown".
        uniform: Where only some layers are grown, widen the others with zeros, so that one width holds for all.
        alpha: The interpolation coefficient, folded into the weights: 0 is the base, 1 as trained.
        dtype: float32, bfloat16 or float16; the base's unless given.
        max_shard_size: The largest file, such as 500MB; 5GB unless given, 1GB of growth.
        start: What training started from, where no run.json says it.
        tag: Which of several checkpoints in a DeepSpeed folder; its `latest` unless given.
        average: For a run: take the mean of this many of its last checkpoints; what the recipe's `average`
            says unless given, or the one that counts.
        scores: A file that `eval --out` wrote, for the model card.
        without_switch: Write a stock checkpoint although the skill has a switch: it is always on there.
        for_: llama.cpp or vllm: refuse what is known to compute something else there, and say what has not been tried.
        json: Print one JSON object.
    """
    from grow.checkpoint.consolidate import consolidate as run
    from grow.methods import export_trained

    coefficient, count = number("--alpha", alpha, float), _count(average)
    with Bar("consolidating") as bar:
        result = run(
            source, out, format, uniform, coefficient, dtype, max_shard_size, start, tag, count, scores, without_switch,
            for_, bar.add, export_trained,
        )  # fmt: skip

    def text(r: dict[str, Any]) -> str:
        note = f"\n{r['note']}" if r.get("note") else ""
        return f"{r['format']} checkpoint of {r['bytes'] / 1e9:.2f} GB written: {r['out']}{note}"

    return say(result, text, json)


def base(source: str, out: str, json: bool = False) -> str:
    """Takes the base model out of a grown checkpoint: the same files, by checksum, as were grown.

    Example: grow base ~/models/gemma-3-1b-grown ~/models/gemma-3-1b-again

    Args:
        source: A grown checkpoint, or a run that started from one.
        out: The base; must not exist yet.
        json: Print one JSON object.
    """
    from grow.checkpoint.package import extract_base as run

    return say(run(source, out), lambda r: f"base of {len(r['files'])} shards written: {r['out']}", json)


def growth(
    source: str, out: str, name: str = "", start: str = "", tag: str = "", average: str = "", json: bool = False
) -> str:
    """Takes the growth alone, without the base: some hundreds of MB, which `attach` puts on the base again.

    Example: grow growth runs/gemma3_270m-translation-g_freeze ~/models/french-growth

    Args:
        source: A training run, one of its checkpoint-N folders, any DeepSpeed checkpoint, or a grown checkpoint.
        out: The growth package; must not exist yet.
        name: Of a grown checkpoint with several skills: which of them.
        start: What training started from, where no run.json says it.
        tag: Which of several checkpoints in a DeepSpeed folder; its `latest` unless given.
        average: For a run: take the mean of this many of its last checkpoints; what the recipe's `average`
            says unless given, or the one that counts.
        json: Print one JSON object.
    """
    from grow.checkpoint.package import extract_growth as run
    from grow.methods import export_trained

    count = _count(average)
    with Bar("writing") as bar:
        result = run(
            source, out, start=start, tag=tag, average=count, progress=bar.add, export=export_trained, name=name
        )
    return say(result, lambda r: f"growth of {r['bytes'] / 1e9:.2f} GB written: {r['out']}", json)


def attach(base: str, *packages: str, alpha: str = "", json: bool = False) -> str:
    """Puts growth packages on the base that they grew from, into OUT; another base is refused.

    One package makes a grown checkpoint as its run did. Several make one with several skills, each with its own layers,
    α and switch.

    Example: grow attach ~/models/gemma-3-1b-pt ~/models/french-growth ~/models/gemma-3-1b-french
    Example: grow attach google/gemma-3-1b-pt french=runs/a/result entailment=runs/b/result both --alpha french=0.5

    Args:
        base: The base, by folder or by hub name.
        packages: A growth package, or several, each NAME=PACKAGE or a folder whose name is that of the skill; and last
            OUT, the grown checkpoint, which must not exist yet.
        alpha: For several skills: interpolation coefficients other than 1, NAME=ALPHA with commas.
        json: Print one JSON object.
    """
    if len(packages) < 2:
        raise UserError("attach: BASE PACKAGE OUT are needed: the base, its growth, and what to write")
    *growths, out = packages

    from grow.checkpoint.package import attach_growth
    from grow.checkpoint.skills import attach_skills, named_packages, parse_alphas

    if len(growths) == 1 and ("=" not in growths[0] or os.path.isdir(growths[0])):
        if alpha:
            raise UserError("attach: --alpha is for several skills; give a single one its α where it is used")
        result = attach_growth(base, growths[0], out)
    else:
        result = attach_skills(base, named_packages(growths), out, parse_alphas(alpha))

    def text(r: dict[str, Any]) -> str:
        rounded = f"; its growth is rounded to the base's dtype, {r['rounded']}" if "rounded" in r else ""
        return f"grown checkpoint written: {r['out']}{rounded}"

    return say(result, text, json)


def _count(average: str) -> int:
    """Returns of how many checkpoints the mean is to be; 0, as the recipe says, where nothing is given."""
    if average and number("--average", average) < 1:
        raise UserError(f"--average {average}: 1 or more")
    return number("--average", average or "0")
