"""Scores rows in one forward pass: the log-probability of each labelled token."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grow.data.examples import Examples
from grow.data.labels import IGNORED
from grow.data.of_recipe import right_option, template_of
from grow.data.packing import PackedDataset, collate
from grow.data.tokens import encode
from grow.errors import UserError
from grow.evaluation.bootstrap import interval
from grow.model.loss import identical, label_scores, labelled_logits, likelihood_and_kl
from grow.model.switched import SwitchedModel
from grow.recipe import Recipe


@dataclass(frozen=True)
class Scores:
    """Holds figures of each row: the log-likelihood of its labels, nats; how many there are, and how many are the
    likeliest token. Where a base is known, also the sum over labels of KL(base ‖ model), nats, and whether all logits
    are the base's bit for bit; where there is a switch, whether it opened."""

    likelihoods: list[float]
    tokens: list[int]
    hits: list[int]
    divergences: list[float] | None = None
    identical: list[bool] | None = None
    opened: list[bool] | None = None

    def summary(self) -> dict[str, Any]:
        """Returns the figures of grow.evaluation.evaluate.evaluate."""
        losses = [-value for value in self.likelihoods]
        exact = [float(hits == tokens) for hits, tokens in zip(self.hits, self.tokens, strict=True)]
        rows, tokens = len(exact), sum(self.tokens)
        found: dict[str, Any] = {
            "loss": math.fsum(losses) / tokens,
            "token_accuracy": sum(self.hits) / tokens,
            "exact_match": sum(exact) / rows,
            "log_likelihood": -math.fsum(losses) / rows,
            "rows": rows,
            "intervals": {
                "loss": interval(losses, self.tokens),
                "token_accuracy": interval(self.hits, self.tokens),
                "exact_match": interval(exact),
                "log_likelihood": interval(self.likelihoods),
            },
            "items": [round(value, 4) for value in self.likelihoods],
            "label_items": self.tokens,
        }
        if self.divergences is not None and self.identical is not None:
            same = sum(self.identical)
            found |= {
                "kl": math.fsum(self.divergences) / tokens, "identical": same / rows, "identical_rows": same,
                "kl_items": [round(value, 6) for value in self.divergences],
                "identical_items": list(map(int, self.identical)),
            }  # fmt: skip
            found["intervals"]["kl"] = interval(self.divergences, self.tokens)
        if self.opened is not None:
            found |= {"opened": sum(self.opened) / rows, "opened_items": list(map(int, self.opened))}
        return found


@torch.no_grad()
def score(
    model: Any,
    examples: Examples,
    recipe: Recipe,
    pad_token_id: int | None,
    what: str,
    base: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> Scores:
    """Returns the scores of tokenised rows, in their order. No row may be longer than the recipe's max_length.

    `base` returns the base's logits where a batch has labels (grow.evaluation.interpolation).
    """
    sequences = PackedDataset(examples, recipe.max_length, pad_token_id or 0)
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    size = recipe.per_device_eval_batch_size
    for start in tqdm(range(0, len(sequences), size), desc=what, leave=False, disable=None):
        batch = collate([sequences[i] for i in range(start, min(start + size, len(sequences)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        for name, values in _label_figures(model, batch, base).items():
            places = batch["rows"][batch["labels"] != IGNORED]
            for row, value in zip(places.tolist(), values.tolist(), strict=True):
                sums[name][row] += value
    tokens = [sum(label >= 0 for label in example.labels) for example in examples]
    rows = range(len(examples))
    figures = {name: [of_row[row] for row in rows] for name, of_row in sums.items()}
    return Scores(
        figures["likelihood"],
        tokens,
        [int(hits) for hits in figures["hit"]],
        figures.get("divergence"),
        [not changed for changed in figures["changed"]] if "changed" in figures else None,
        [bool(opened) for opened in figures["opened"]] if "opened" in figures else None,
    )


def _label_figures(
    model: Any, batch: dict[str, Tensor], base: Callable[[dict[str, Tensor]], Tensor] | None
) -> dict[str, Tensor]:
    """Returns figures of each label, [N] each, to be summed over rows."""
    logits, labels = labelled_logits(model, batch)
    found = dict(zip(("likelihood", "hit"), label_scores(logits, labels), strict=True))
    if isinstance(model, SwitchedModel):
        found["opened"] = model.switch.tokens_on(batch["labels"])[batch["labels"] != IGNORED]
    if base is not None:
        expected = base(batch)
        found["divergence"] = likelihood_and_kl(logits, expected, labels)[1]
        found["changed"] = ~identical(logits, expected)
    return found


def right_options(rows: Any, recipe: Recipe) -> list[int]:
    """Returns the index of each row's own completion among the recipe's options. Raises UserError if it is not
    there."""
    return [recipe.options.index(right_option(recipe, row)) for row in rows]


def choices(model: Any, rows: Any, recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Returns `accuracy` with its interval: the share of rows whose own completion is the likeliest of the recipe's
    options, by the sum of its tokens' log-probabilities.

    Options that are equally likely, as those of one token often are in bf16, share the hit. An end token counts only
    if one option is the beginning of another, which would never be the likelier without it. Raises
    UserError if no row fits with every option.
    """
    right = right_options(rows, recipe)
    end = any(one != other and other.startswith(one) for one in recipe.options for other in recipe.options)
    likelihoods = []
    for option in recipe.options:
        literal = option.replace("{", "{{").replace("}", "}}")
        template = dataclasses.replace(template_of(recipe), completion=literal)
        encoded = encode(rows, tokenizer, template, recipe.max_length, end=end)
        if not encoded.examples:
            raise UserError(f"options: no test row can be scored with {option!r}: {encoded.reasons()}")
        scores = score(model, encoded.examples, recipe, tokenizer.pad_token_id, option.strip())
        bad = {row for some in encoded.bad.values() for row in some}
        kept = [row for row in range(len(right)) if row not in bad]
        likelihoods.append(dict(zip(kept, scores.likelihoods, strict=True)))
    hits = []
    for index, place in enumerate(right):
        if all(index in of_option for of_option in likelihoods):
            found = [of_option[index] for of_option in likelihoods]
            likeliest = max(found)
            hits.append((found[place] == likeliest) / found.count(likeliest))
    if not hits:
        raise UserError(f"options: no test row can be scored with every one of them at max_length {recipe.max_length}")
    return {
        "accuracy": sum(hits) / len(hits), "accuracy_rows": len(hits), "accuracy_items": hits,
        "intervals": {"accuracy": interval(hits)},
    }  # fmt: skip
