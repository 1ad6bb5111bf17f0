"""What is wrong with a run, said before anything heavy."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from grow.checkpoint.run_folder import MARKER
from grow.checkpoint.shards import Checkpoint
from grow.data.of_recipe import right_option, rows_of, tokenizer_of
from grow.data.packing import summary
from grow.errors import UserError
from grow.methods.peft_method import PeftMethod
from grow.model.attention import check_attention
from grow.model.images import check_images
from grow.model.loading import check_loads, class_of
from grow.parts.part import is_transposed
from grow.recipe import Recipe
from grow.switch.of_recipe import layer_to_read
from grow.training.arguments import check_arguments, check_output, planned_ranks
from grow.training.batch_size import check_batch_size
from grow.training.compiling import check_compile
from grow.training.liger import check_liger
from grow.training.quiet import quiet
from grow.training.run_data import probe_of, read_data, steps_of
from grow.training.run_file import first_day
from grow.training.same_run import check_same_run
from grow.training.start import growing_parts, planned_start, starting_checkpoint, with_learning_rate


def check_run(recipe: Recipe, find_start: Callable[[Recipe], Checkpoint] = starting_checkpoint) -> Checkpoint:
    """Checks the run before anything heavy is loaded. Returns the checkpoint to start from. Raises UserError."""
    run, world_size = Path(recipe.output_dir), planned_ranks()
    if recipe.left_out and os.environ.get("RANK", "0") == "0":
        named = ", ".join(f"{name} {value}" for name, value in recipe.left_out.items())
        print(f"{recipe.method}: without the recipe's {named}; --average N has it average, too", file=sys.stderr)
    check_output(recipe.output_dir)
    start = find_start(recipe)
    per_step = world_size * recipe.micro_batch
    if recipe.train_batch_size % per_step:
        raise UserError(
            f"train_batch_size {recipe.train_batch_size} is not a multiple of {world_size} ranks x "
            f"per_device_train_batch_size {recipe.micro_batch}"
        )
    check_batch_size(recipe)
    check_compile(recipe)
    check_liger(recipe)
    config, cls = class_of(start.path)
    check_attention(recipe.attn_implementation, cls, config)
    method = recipe.make_method()
    check_images(recipe, any(part.of_images for part in growing_parts(recipe)), config)
    method.check(recipe)
    method.check_names(start.tensors)
    if isinstance(method, PeftMethod) and is_transposed(start.config):
        raise UserError(
            f"{start.path}: has matrices that lie transposed (Conv1D), which {recipe.method} does not adapt; take sft, "
            "or grow it (g_freeze, g_train)"
        )
    if recipe.switch:
        layer_to_read(recipe, start)
    check_same_run(run, recipe)
    with quiet():
        check_loads(start)
        check_arguments(recipe)
    return start


def check_all(recipe: Recipe) -> None:
    """Checks a run without starting it, as far as the machine does not matter. Reads the rows into the cache, and
    prints a summary of them on stderr. Raises UserError for whatever `train` would find wrong before it trains."""
    recipe = with_learning_rate(recipe)
    start = check_run(recipe, planned_start)
    if (Path(recipe.output_dir) / MARKER).exists():
        return
    recipe = recipe.on(first_day(Path(recipe.output_dir)))
    tokenizer = tokenizer_of(recipe)
    _check_scores(recipe)
    data = read_data(recipe, start, tokenizer)
    steps_of(recipe, data["train"])
    probe_of(recipe, tokenizer, Path(recipe.output_dir))
    for name, sequences in data.items():
        print(f"{name}: {summary(sequences)}", file=sys.stderr)
    same = data["train"].examples.checksum() == data["validation"].examples.checksum()
    if same or recipe.validation_split.partition("[")[0] == recipe.train_split:
        print(
            "validation: these rows are trained on; cut them, such as --train_split 'train[:90%]' "
            "--validation_split 'train[90%:]'",
            file=sys.stderr,
        )


def _check_scores(recipe: Recipe) -> None:
    """Checks what `eval` needs after training. Raises UserError for options that no row has; a missing test split is
    only reported."""
    for row in rows_of(recipe, recipe.validation_split)[:1000] if recipe.options else ():
        with contextlib.suppress(ValueError):  # a bad row
            right_option(recipe, row)
    try:
        rows_of(recipe, recipe.test_split)
    except UserError as error:
        print(f"{error}: there will be nothing to score the run on", file=sys.stderr)
