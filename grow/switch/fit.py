"""Fits a switch to a recipe's task, on its base: before training, since what is read is the base's own.

Half of every kind of rows has no part in the fit; these held-out rows set the threshold, and the table is of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.switch_record import SwitchRecord
from grow.checkpoint.writer import weights_checksum
from grow.data.examples import Examples
from grow.data.of_recipe import rows_of, template_of, tokenizer_of
from grow.data.tokens import encode_cached
from grow.data.writing import SELF_TOKENS, self_text, text_checksum
from grow.errors import UserError
from grow.model.features import looking_back, mlp_inputs
from grow.recipe import Recipe
from grow.switch.detector import auroc, fit, threshold
from grow.switch.near import near_prompts
from grow.switch.rows import ON_ROWS, Prompts, after_rows, retention_prompts, task_prompts, variations

DECAY = 0.5
"""What a token of the prompt weighs of what the next one does, where the prompt's end decides: one token alone does
not tell the template in another language from the task (recipes/study/switch.md)."""
OWN, NEAR = "text that the base writes", "near text that the base writes"
_LOOKED_AT = 300  # rows of a set that is in the table alone
_LEAST_OPEN = {"row": 0.9, "answer": 0.9, "token": 0.5}
"""Of the task's validation rows, or tokens: a text of which some tokens are off still gains from the others."""
_MOST_OPEN = 0.1  # of any kind of other text


@dataclass(frozen=True)
class _Kind:
    """Holds the features of prompts of one kind, each [tokens, h]. `every`: each token of them decides for itself, all
    but the first, which begins every text; otherwise the last one decides."""

    name: str
    features: list[Tensor]
    every: bool

    def fitted(self) -> Tensor:
        """Returns the features on which the detector is fitted, [N, h]."""
        return self._of(self.features[::2])

    def held_out(self) -> Tensor:
        """Returns those that have no part in the fit, [N, h]; of a single prompt, that."""
        return self._of(self.features[1::2] or self.features)

    def all(self) -> Tensor:
        """Returns those of every prompt, [N, h]."""
        return self._of(self.features)

    def _of(self, features: list[Tensor]) -> Tensor:
        return torch.cat([x[1:] if self.every else x[-1:] for x in features])


def fit_switch(
    model: Any, recipe: Recipe, kind: str, layer: int, on: Sequence[Prompts] = (), off: Sequence[Prompts] = ()
) -> SwitchRecord:
    """Fits a switch of a kind ("row", "answer" or "token") that reads a layer.

    `model` is the recipe's base, or has it inside. `on` are prompts with the same request in other words, `off` those
    that are to be left alone. Raises UserError where the task cannot be told apart from other text.
    """
    tokenizer, every = tokenizer_of(recipe), kind == "token"
    decay = 0.0 if every else DECAY
    base = weights_checksum(Checkpoint(recipe.base_name).shards)
    print("switch: the base writes text by itself", file=sys.stderr, flush=True)
    passages = self_text(lambda: model, tokenizer, base)
    examples = _examples(recipe, recipe.train_split, tokenizer)
    prompts = task_prompts(examples, ON_ROWS, whole=every)
    wanted = [Prompts("training rows", prompts)]
    wanted += [] if every else variations(examples, prompts, passages, tokenizer)
    wanted += on
    print("switch: the base writes near text", file=sys.stderr, flush=True)
    near = after_rows(near_prompts(model, recipe, passages, tokenizer), examples, tokenizer)
    others = [Prompts(NEAR, near), *off]
    validation = task_prompts(_examples(recipe, recipe.validation_split, tokenizer), _LOOKED_AT, whole=every)

    def read(of: Prompts, each: bool = every) -> _Kind:
        found = mlp_inputs(model, of.prompts, layer, of.name)
        return _Kind(of.name, [looking_back(x, decay) for x in found], each)

    print(f"switch: reading layer {layer}", file=sys.stderr, flush=True)
    own = read(Prompts(OWN, passages))
    task, rest = [read(of) for of in wanted], [read(of, each=False) for of in others if of.prompts]
    # A text may end at any of its tokens, so all of the base's own are fitted on; in the threshold a row counts once.
    detector = fit(
        [torch.cat([of.fitted() for of in task])],
        [_Kind(OWN, own.features, every=True).fitted(), *(of.fitted() for of in rest)],
    )
    held_out = {of.name: detector.scores(of.held_out()) for of in (*task, own, *rest)}
    of_task = torch.cat([held_out[of.name] for of in task])
    limit = threshold(of_task, torch.cat([held_out[of.name] for of in (own, *rest)]), every)
    table = [
        _line("task", "validation rows", detector.scores(read(Prompts("", validation)).all()), of_task, limit.value)
    ]
    table += [_line("task", of.name, held_out[of.name], of_task, limit.value) for of in task]
    table += [_line("other", of.name, held_out[of.name], of_task, limit.value) for of in (own, *rest)]
    for known in retention_prompts(recipe, tokenizer, _LOOKED_AT):
        table.append(_line("known", known.name, detector.scores(read(known).all()), of_task, limit.value))
    facts = {
        "base": base,
        "self_text": {"tokens": SELF_TOKENS, "seed": 0, "checksum": text_checksum(passages)},
        "on": [of.name for of in on],
        "off": [of.name for of in off],
        "opens_at_most": limit.opens_at_most,
        "table": table,
    }
    check_table(table, kind)
    return SwitchRecord(kind, layer, detector.weight.float().numpy(), limit.value - detector.bias, decay, facts=facts)


def _examples(recipe: Recipe, split: str, tokenizer: Any) -> Examples:
    return encode_cached(rows_of(recipe, split), tokenizer, template_of(recipe), recipe.max_length).examples


def _line(what: str, name: str, scores: Tensor, of_task: Tensor, limit: float) -> dict[str, Any]:
    """Returns a line of the table: of the task's rows, of other text, or of what the base knows ("known")."""
    line = {"kind": what, "name": name, "rows": len(scores), "open": float((scores > limit).double().mean())}
    return line if what == "task" else line | {"auroc": auroc(of_task, scores)}


def check_table(table: list[dict[str, Any]], kind: str) -> None:
    """Raises UserError where a switch would not do what it is for. One text alone, of a few, tells nothing."""
    task, unit = table[0], "tokens" if kind == "token" else "rows"
    if (1 - task["open"]) * task["rows"] > max(1, (1 - _LEAST_OPEN[kind]) * task["rows"]):
        raise UserError(
            f"switch: the task cannot be told apart: {task['open']:.0%} of the validation {unit} would open; see "
            "whether they are like the training rows (grow preview), or train without a switch"
        )
    for line in table:
        if line["kind"] == "other" and line["open"] * line["rows"] > max(1, _MOST_OPEN * line["rows"]):
            raise UserError(
                f"switch: the task cannot be told apart from {line['name']}, {line['open']:.0%} of which would open; "
                "give the template words that no other text has, or train without a switch"
            )
