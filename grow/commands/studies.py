"""Commands that say where a model learns, and how: of runs, offline.

Heavy imports happen inside a command, so that --help answers at once.
"""

import os
from typing import Any

from grow.arguments import number
from grow.errors import UserError, unknown
from grow.text import dial_text, layer_dial_text, say


def rank(
    *runs: str, out: str, by: str = "update", cost: bool = False, start: str = "", recipe: str = "",
    batches: str = "8", json: bool = False, **fields: str,
) -> str:  # fmt: skip
    """Orders layers by how much their weights moved in a pilot run, for expand --layers top:6:DIR/ranking.json.

    Of several runs (seeds), by the mean. No model is built, but for --by gradient, which needs no run.

    Example: python -m grow rank runs/pilot --out runs/ranking
    Example: python -m grow rank --by gradient --recipe recipes/gemma3_270m/translation.yaml --out runs/ranking

    Args:
        runs: Training runs, or their checkpoint-N; or, with --start, stock checkpoints.
        out: The folder for ranking.json, ranking.md and ranking.png.
        by: "update" of the MLP, its Frobenius norm; "relative", that norm by the weights'; or "gradient".
        cost: Divide by what training the layer costs: 1 + (n - i) / n for layer i of n.
        start: What a stock checkpoint was trained from.
        recipe: For --by gradient: whose base and training rows.
        batches: For --by gradient: how many batches.
        json: Print one JSON object.
        fields: Fields of the recipe that are given another value.
    """
    from grow.analysis.ranking import ORDERS, measure, write_ranking
    from grow.analysis.ranking import rank as order

    if by not in ORDERS:
        raise UserError(f"rank: {unknown(by, ORDERS, 'way to rank')}")
    if by == "gradient":
        if runs or not recipe:
            raise UserError("rank: --by gradient needs no run, and a recipe: --recipe FILE")
        samples, layers, over = _gradients(recipe, fields, number("--batches", batches))
    else:
        if not runs or recipe or fields:
            raise UserError(f"rank: --by {by} needs a training run at least, and no recipe")
        measured = [measure(run, start) for run in runs]
        samples, layers = [norms for norms, _ in measured], measured[0][1]
        over = f"mean ± standard deviation over {len(runs)} runs" if len(runs) > 1 else f"of {runs[0]}"
    rows = order(samples, layers, by, cost)
    result = write_ranking(rows, out, by, cost, runs or (recipe,), over)
    return say(result, lambda r: f"{r['text']}\nwritten: {r['out']}/ranking.json", json)


def _gradients(recipe: str, fields: dict[str, str], batches: int) -> tuple[list[Any], int, str]:
    from grow.recipe import read_recipe

    settings = read_recipe(recipe, fields)

    from grow.analysis.gradients import measure

    samples, layers = measure(settings, batches)
    return samples, layers, f"mean ± standard deviation over {batches} batches of {settings.train_batch_size} sequences"


def effective_rank(run: str, out: str, start: str = "", tag: str = "", json: bool = False) -> str:
    """Says how many directions each weight update has, against random matrices and bf16 rounding. No model is built.

    Example: python -m grow effective-rank runs/gemma3_270m-translation-sft --out runs/ranks

    Args:
        run: A training run, one of its checkpoint-N, any DeepSpeed checkpoint, a grown checkpoint; or, with --start, a
            stock one.
        out: The folder for effective_rank.json, effective_rank.md and effective_rank.png, a map of layers and matrices.
        start: What training started from, where no run.json says it.
        tag: Which of several checkpoints in a DeepSpeed folder; its `latest` unless given.
        json: Print one JSON object.
    """
    from grow.analysis.effective_rank import effective_ranks, write_ranks

    result = write_ranks(effective_ranks(run, start, tag), out, run)
    return say(result, lambda r: f"{r['text']}\nwritten: {r['out']}/effective_rank.md", json)


def dial(
    checkpoint: str, max_kl: str = "0.01", text: str = "", passages: str = "32", start: str = "", json: bool = False
) -> str:
    """Finds the largest α that keeps a trained model within a bound of its base, by KL on general text.

    KL(base ‖ model) of the next token, nats, the mean over all positions of the text. Bisection: a few passes over it.

    Example: python -m grow dial ~/models/gemma-3-270m-french-grown --max-kl 0.01 --text prose.txt

    Args:
        checkpoint: A grown checkpoint, or what a run by `adapter` ends in; or, with --start, a stock one.
        max_kl: The bound, in nats a token.
        text: FILE.txt, whose paragraphs are the passages, or FILE.jsonl with a column text; English fiction unless
            given, which recipes/gemma3_270m/fetch.py prose brings.
        passages: How many passages, of 256 tokens at most.
        start: What a stock checkpoint was trained from; its weights are interpolated.
        json: Print one JSON object.
    """
    bound, count = number("--max-kl", max_kl, float), number("--passages", passages)

    if not bound > 0 or count < 1:
        raise UserError(f"dial: --max-kl {max_kl} and --passages {passages}: both are more than 0")

    from grow.evaluation.divergence import find_alpha

    return say(find_alpha(checkpoint, start, text, count, bound), dial_text, json)


def layer_dial(
    checkpoint: str, out: str, recipe: str, text: str = "", kl_weight: str = "2", steps: str = "40", json: bool = False,
    **fields: str,
) -> str:  # fmt: skip
    """Learns a place of the dial for each layer of a grown checkpoint: what α = 1 is there. α = 0 stays the base.

    Minimises the task's loss on the recipe's validation rows + kl_weight times KL(base ‖ model) on general text, over
    one number a layer. OUT is the same checkpoint, its shards linked.

    Example: python -m grow layer-dial GROWN OUT --recipe recipes/gemma3_270m/translation.yaml

    Args:
        checkpoint: A grown checkpoint, trained.
        out: The folder to write.
        recipe: The task.
        text: Folders of general text, with commas, whose split train has a column text; English fiction unless given,
            which recipes/gemma3_270m/fetch.py prose brings.
        kl_weight: What a nat of KL weighs beside a nat of the task's loss: more of it stays nearer to the base.
        steps: How many, of one sequence of each.
        json: Print one JSON object.
        fields: Fields of the recipe that are given another value.
    """
    weight, count = number("--kl-weight", kl_weight, float), number("--steps", steps)
    if not weight > 0 or count < 1:
        raise UserError(f"layer-dial: --kl-weight {kl_weight} and --steps {steps}: both are more than 0")

    from grow.recipe import read_recipe

    settings = read_recipe(recipe, fields)
    folders = text.split(",") if text else [os.path.expandvars("${GROW_CACHE}/gemma3_270m/prose")]

    from grow.evaluation.layer_dial import layer_dial as run

    return say(run(checkpoint, out, settings, folders, weight, count), layer_dial_text, json)
