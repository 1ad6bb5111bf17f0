"""The switch of a run: fitted once, before the first step, and kept in RUN/switch."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grow.checkpoint.files import write_json
from grow.checkpoint.growable import make_plan
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.switch_record import SwitchRecord, switch_file, switch_of_run
from grow.data.of_recipe import rows_of, template_of, tokenizer_of
from grow.data.tokens import encode_cached
from grow.errors import UserError, unknown
from grow.model.loading import compute_device, compute_dtype, load
from grow.model.lora import highest_unchanged
from grow.names import mlp_prefixes
from grow.parts import parts_of
from grow.plan import GrowthPlan
from grow.recipe import Recipe
from grow.recipe_values import FITTED
from grow.switch.fit import OWN, fit_switch
from grow.switch.rows import ON_ROWS, Prompts, other_rows, task_prompts

_LEAST_CALLED = 0.99


def switch_of(recipe: Recipe, start: Checkpoint) -> SwitchRecord | None:
    """Returns the switch that a recipe asks for, as its run has it or else made now; None if it asks for none.

    `start` is the checkpoint that training starts from. Raises UserError where there can be none.
    """
    if not recipe.switch:
        return None
    return switch_of_run(Path(recipe.output_dir)) or make_switch(recipe, start)


def make_switch(
    recipe: Recipe, start: Checkpoint, layer: str = "auto", on: Sequence[str] = (), off: Sequence[str] = ()
) -> SwitchRecord:
    """Makes a recipe's switch, prints its table to stderr, and writes it to the run's folder.

    `layer` is "auto" or a number; `on` and `off` name data sets (grow.switch.fit.fit_switch).
    """
    read, lowest, count = layer_to_read(recipe, start, layer)
    if recipe.fits_switch:
        tokenizer = tokenizer_of(recipe)
        more = [[Prompts(name, other_rows(name, recipe, tokenizer)) for name in names] for names in (on, off)]
        model = load(recipe.base_name, compute_dtype()).to(compute_device())
        record = fit_switch(model, recipe, recipe.switch, read, *more)
        print(table_text(record, lowest, count), file=sys.stderr)
    else:
        record = _called(recipe)
    write_json(switch_file(Path(recipe.output_dir)), record.values())
    return record


def layer_to_read(recipe: Recipe, start: Checkpoint, layer: str = "auto") -> tuple[int, int, int]:
    """Returns the layer that a recipe's switch reads, the highest that it can read in the same pass, and the number of
    layers. Raises UserError where there can be no such switch."""
    count, lowest = len(mlp_prefixes(start.tensors)), lowest_layer(recipe, start)
    read = reading_layer(layer, lowest, count)
    if recipe.switch == "token" and read > lowest:
        raise UserError(
            f"switch: token: layer {read} is read, to which training changes what comes; decide by row, or leave what "
            "lies below as it is (--layers upper, --attention_layers upper, no embedding)"
        )
    return read, lowest, count


def refit(recipe: Recipe, kind: str, layer: str, on: Sequence[str], off: Sequence[str]) -> SwitchRecord:
    """Fits the switch of a run, before or after it, in the place of the one that it has (`fit-switch`).

    Raises UserError as fit_switch does, and for a kind that is not fitted or a method that leaves no base.
    """
    if kind not in FITTED:
        raise UserError(f"--kind {kind}: {unknown(kind, FITTED, 'switch')}")
    recipe = dataclasses.replace(recipe, switch=kind)
    recipe.make_method().check(recipe)
    start = recipe.start if os.path.isdir(recipe.start) else recipe.base_name
    return make_switch(recipe, Checkpoint(start), layer, on, off)


def lowest_layer(recipe: Recipe, start: Checkpoint) -> int:
    """Returns the highest layer that can be read in the pass for which it decides: the lowest whose MLP grows, or the
    one below the lowest with a LoRA or heads that grow; −1 if there is none."""
    method = recipe.make_method()
    if not method.grows:
        return highest_unchanged(list(method.added_shapes({name: info.shape for name, info in start.tensors.items()})))
    plan = GrowthPlan.from_config(start.config) or make_plan(start, **recipe.growth)
    grown = parts_of(plan)
    if any(part.of_images for part, _ in grown):
        raise UserError(
            "switch: is decided by text, after the tower for images has computed; take it out, or leave the tower as "
            "it is"
        )
    return min(min(where.layers) - part.reads_below for part, where in grown)


def reading_layer(layer: str, lowest: int, count: int) -> int:
    """Returns the layer that a switch reads in a model of `count` layers of which `lowest` can be read in the same pass
    (lowest_layer): for "auto" that one, unless training changes the lowest third; then the first above that third.

    Raises UserError for anything but "auto" or a layer of the model.
    """
    if layer == "auto":
        third = -(-count // 3)
        return lowest if lowest >= third - 1 else third
    if not layer.isdecimal() or int(layer) >= count:
        raise UserError(f"--layer {layer}: auto, or one of the layers 0-{count - 1}")
    return int(layer)


def _called(recipe: Recipe) -> SwitchRecord:
    """Returns a switch of the kind "call". Raises UserError where prompts of the task do not have its text."""
    text, tokenizer = recipe.switch.removeprefix("call:"), tokenizer_of(recipe)
    tokens = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    rows, template = rows_of(recipe, recipe.train_split), template_of(recipe)
    prompts = task_prompts(encode_cached(rows, tokenizer, template, recipe.max_length).examples, ON_ROWS)
    size = len(tokens)
    having = [any(tuple(p[i : i + size]) == tokens for i in range(len(p))) for p in prompts]
    if sum(having) < _LEAST_CALLED * len(prompts):
        raise UserError(
            f"switch: {text!r} stands, as tokens, in {sum(having)} of {len(prompts)} of the task's prompts; name text "
            "that stands in all of them, from the beginning of a line or of a word on"
        )
    return SwitchRecord("call", tokens=tokens, facts={"text": text})


def table_text(record: SwitchRecord, lowest: int, count: int) -> str:
    """Returns the table of a fitted switch, and what it means in a line."""
    how = "in the same pass"
    if record.layer > lowest:
        how = f"in a first pass of the base up to there, which adds some {record.layer / count:.0%} to a prompt's time"
    name = max(len(line["name"]) for line in record.facts["table"])
    lines = [f"switch: {record.kind}, reads layer {record.layer} of {count}, {how}"]
    lines.append(f"{'':<{name}}    rows   AUROC    open")
    for line in record.facts["table"]:
        area = f"{line['auroc']:.4f}" if "auroc" in line else ""
        lines.append(f"{line['name']:<{name}} {line['rows']:>7,} {area:>7} {line['open']:>7.1%}")
    unit = "tokens" if record.kind == "token" else "rows"
    lines.append(
        f"It opens for {record.facts['table'][0]['open']:.1%} of the validation {unit}; of further {unit} such as "
        f"{OWN}, or near text, at most {record.facts['opens_at_most']:.1%} open it."
    )
    return "\n".join(lines)
