"""Commands that analyse, offline, where and how a run has moved its weights.

Heavy imports happen inside a command, so that --help answers at once.
"""

from typing import Any

from grow.cli.arguments import number
from grow.cli.format import say
from grow.errors import UserError, unknown


def rank(
    *runs: str, out: str, by: str = "update", cost: bool = False, start: str = "", recipe: str = "",
    batches: str = "8", json: bool = False, **fields: str,
) -> str:  # fmt: skip
    """Orders layers by how much their weights moved in a pilot run, for expand --layers top:6:DIR/ranking.json.

    Several runs (seeds) are ranked by their mean. No model is built, except for --by gradient, which needs no run.

    Example: grow rank runs/pilot --out runs/ranking
    Example: grow rank --by gradient --recipe recipes/gemma3_270m/translation.yaml --out runs/ranking

    Args:
        runs: Training runs, or their checkpoint-N; or, with --start, stock checkpoints.
        out: The folder for ranking.json, ranking.md and ranking.png.
        by: "update" of the MLP, its Frobenius norm; "relative", that norm by the weights'; or "gradient".
        cost: Divide by what training the layer costs: 1 + (n - i) / n for layer i of n.
        start: What a stock checkpoint was trained from.
        recipe: For --by gradient: the recipe whose base and training rows are used.
        batches: For --by gradient: how many batches.
        json: Print one JSON object.
        fields: Fields of the recipe that are given another value.
    """
    from grow.analysis.ranking import ORDERS, update_norms, write_ranking
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
        measured = [update_norms(run, start) for run in runs]
        samples, layers = [norms for norms, _ in measured], measured[0][1]
        over = f"mean ± standard deviation over {len(runs)} runs" if len(runs) > 1 else f"of {runs[0]}"
    rows = order(samples, layers, by, cost)
    result = write_ranking(rows, out, by, cost, runs or (recipe,), over)
    return say(result, lambda r: f"{r['text']}\nwritten: {r['out']}/ranking.json", json)


def _gradients(recipe: str, fields: dict[str, str], batches: int) -> tuple[list[Any], int, str]:
    from grow.methods import read_recipe

    settings = read_recipe(recipe, fields)

    from grow.analysis.gradients import gradient_norms

    samples, layers = gradient_norms(settings, batches)
    return samples, layers, f"mean ± standard deviation over {batches} batches of {settings.train_batch_size} sequences"


def effective_rank(run: str, out: str, start: str = "", tag: str = "", json: bool = False) -> str:
    """Says how many directions each weight update has, against random matrices and bf16 rounding. No model is built.

    Example: grow effective-rank runs/gemma3_270m-translation-sft --out runs/ranks

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
