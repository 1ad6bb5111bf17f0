"""KL(base ‖ model) of the next token says how far a model is from its base; find-alpha keeps it within a bound."""

import json
import os
from collections.abc import Callable
from math import floor, sqrt
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from tqdm import tqdm

from grow.data.examples import Examples, all_learnt
from grow.data.packing import PackedDataset, collate
from grow.data.tokenizer import load_tokenizer
from grow.errors import UserError
from grow.evaluation.bootstrap import interval
from grow.evaluation.interpolation import Interpolation, check_alphas
from grow.model.grown import grown_beside_text
from grow.model.layouts import modules_of
from grow.model.loss import labelled_logits, likelihood_and_kl
from grow.model.switched import SwitchedModel, set_switch
from grow.parts import PARTS

PROSE = "gemma3_270m/prose/test.jsonl"
"""The default text in the cache: English fiction."""
_TOKENS = 256
"""The longest passage; the rest of a longer one is left out."""
_CLOSE = 0.01
"""The search ends this near to the bound, as a share of it, or when α is known to half of this."""


def read_passages(path: str, tokenizer: Any, limit: int) -> Examples:
    """Returns the first passages of a text, each with a label at every position: paragraphs of a plain file, between
    blank lines; the column `text` of a .jsonl. Raises UserError if there is none."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".jsonl"):
            texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        else:
            texts = [" ".join(part.split()) for part in content.split("\n\n")]
    except OSError as error:
        hint = (
            "; recipes/gemma3_270m/fetch.py prose brings it, or name a text"
            if path.endswith("prose/test.jsonl")
            else ""
        )
        raise UserError(f"--text {path}: cannot be read ({error.strerror}){hint}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--text {path}: is neither plain UTF-8 nor JSONL with a column text") from None
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"--text {path}: a row's text is no text")
    wanted = [text for text in texts if text.strip()][:limit]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    found = tokenizer(wanted, add_special_tokens=False).input_ids if wanted else []
    passages = [ids for ids in (begin + own[:_TOKENS] for own in found) if len(ids) > 1]
    if not passages:
        raise UserError(f"--text {path}: no passage in it")
    return all_learnt(passages)


@torch.no_grad()
def kl_from_base(interpolation: Interpolation, passages: Examples) -> dict[str, Any]:
    """Returns, at the α that is set and over all positions of the passages, in nats per token: `kl` from the base with
    its `interval`, 95 % over passages, and `cross_entropy` of the text."""
    sequences = PackedDataset(passages, max(_TOKENS, int(passages.lengths.max())), 0)
    divergence, loss = ([0.0] * len(passages) for _ in range(2))
    for index in tqdm(range(len(sequences)), desc=f"α = {interpolation.alpha:g}", leave=False, disable=None):
        batch = {name: tensor.to(interpolation.model.device) for name, tensor in collate([sequences[index]]).items()}
        base = interpolation.base_logits(batch)
        logits, labels = labelled_logits(interpolation.model, batch)
        likelihoods, divergences = likelihood_and_kl(logits, base, labels)
        rows = batch["rows"][batch["rows"] >= 0]
        for row, value, apart in zip(rows.tolist(), likelihoods.tolist(), divergences.tolist(), strict=True):
            divergence[row] += apart
            loss[row] -= value
    tokens = passages.lengths.tolist()
    return {
        "alpha": interpolation.alpha,
        "kl": sum(divergence) / sum(tokens),
        "interval": interval(divergence, tokens),
        "cross_entropy": sum(loss) / sum(tokens),
    }


def largest_alpha(measured: Callable[[float], dict[str, Any]], bound: float) -> list[dict[str, Any]]:
    """Returns all measurements made to find the largest α whose KL is within the bound, that one last.

    The search is a bisection in which every other step interpolates: near the base the KL grows as α². α has three
    decimals.
    """
    seen = [{"alpha": 0.0, "kl": 0.0, "interval": (0.0, 0.0)}, measured(1.0)]
    low, high = seen
    if high["kl"] <= bound:
        return seen
    while high["alpha"] - low["alpha"] > _CLOSE / 2 and low["kl"] < (1 - _CLOSE) * bound:
        share = 0.5
        if len(seen) % 2 == 0:
            share = (sqrt(bound) - sqrt(low["kl"])) / (sqrt(high["kl"]) - sqrt(low["kl"]))
        # Rounded down: interpolation aims at the bound itself, and an α beyond it is useless.
        alpha = floor(1000 * (low["alpha"] + share * (high["alpha"] - low["alpha"]))) / 1000
        if not low["alpha"] < alpha < high["alpha"]:
            break
        seen.append(measured(alpha))
        low, high = (seen[-1], high) if seen[-1]["kl"] <= bound else (low, seen[-1])
    return [*(point for point in seen if point is not low), low]


def find_alpha(path: str, start: str, text: str, passages: int, bound: float) -> dict[str, Any]:
    """Returns the result of `find-alpha` for a checkpoint; `next` is the command to run next.

    Raises UserError for a checkpoint without its base, and for a text that cannot be used.
    """
    text = text or os.path.join(os.environ.get("GROW_CACHE") or os.path.expanduser("~/.cache/grow"), PROSE)
    check_alphas(path, start, (0.0,))
    examples = read_passages(text, load_tokenizer(path), passages)
    interpolation = Interpolation(path, start)
    switched = isinstance(interpolation.model, SwitchedModel)
    if switched:
        set_switch(interpolation.model, "on")  # as what is consolidated will be: a stock model has none
    if grown_beside_text(interpolation.model):
        raise UserError(
            f"{path}: its tower for images or the projector has grown, of which the KL of text says nothing; score "
            "it on rows with images: grow eval CHECKPOINT --recipe RECIPE --alpha 0,0.5,1"
        )

    def measured(alpha: float) -> dict[str, Any]:
        interpolation.set(alpha)
        return kl_from_base(interpolation, examples)

    seen = largest_alpha(measured, bound)
    return {
        "checkpoint": path,
        "switched": switched,
        "next": f"grow {_next(interpolation, path, start)} --alpha {seen[-1]['alpha']:g}",
        **seen[-1],
        "max_kl": bound,
        "text": text,
        "passages": len(examples),
        "tokens": int(examples.lengths.sum()),
        "seen": sorted(seen, key=lambda point: point["alpha"]),
    }


def _next(interpolation: Interpolation, path: str, start: str) -> str:
    model = interpolation.model
    kinds = [[hasattr(one, "grown") for one in modules_of(model, part).values()] for part in PARTS.values()]
    if not start and not any(map(any, kinds)):
        return f"eval {quote(path)} --recipe RECIPE"  # an adapter is in no stock checkpoint
    options = [
        " --uniform" * any(any(grown) and not all(grown) for grown in kinds),
        " --without-switch" * isinstance(model, SwitchedModel),
        f" --start {quote(start)}" * bool(start),
    ]
    return f"consolidate {quote(path)} OUT{''.join(options)}"
