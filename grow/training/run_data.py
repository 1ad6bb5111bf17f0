"""What a run learns from, validates on, and watches."""

import os
import sys
from math import ceil
from pathlib import Path
from typing import Any

from grow.checkpoint.shards import Checkpoint
from grow.data.of_recipe import read_mixed, read_sequences, retention_rows, retention_template
from grow.data.packing import Epochs, Mixed, PackedDataset
from grow.data.tokenizer import check_vocabulary, pad_token_id
from grow.data.tokens import encode
from grow.recipe import Recipe
from grow.training.probe import Probe
from grow.training.run_file import check_rows


def read_data(recipe: Recipe, start: Checkpoint, tokenizer: Any) -> dict[str, PackedDataset]:
    """Returns the rows to learn from ("train", and "mix: FOLDER" of those mixed in) and to validate on ("validation"),
    in packed sequences, from the cache if they were read before.

    Raises UserError for rows, templates and tokenizers that cannot be used.
    """
    splits = {"train": recipe.train_split, "validation": recipe.validation_split}
    data = {name: read_sequences(recipe, tokenizer, split) for name, split in splits.items()}
    data |= {f"mix: {name}": sequences for name, sequences in read_mixed(recipe, tokenizer).items()}
    check_vocabulary(max(sequences.examples.largest() for sequences in data.values()), start)
    check_rows(Path(recipe.output_dir), data)
    return data


def steps_of(recipe: Recipe, sequences: PackedDataset) -> int:
    """Returns how many steps a run has; says so on stderr if it makes fewer checkpoints than a mean is to be of."""
    share = 1 - sum(recipe.mix.values())
    in_epochs = ceil(recipe.num_train_epochs * len(sequences) / share / recipe.train_batch_size)
    steps = recipe.max_steps if recipe.max_steps >= 1 else in_epochs
    made = ceil(steps / recipe.save_steps)
    if made < recipe.average and os.environ.get("RANK", "0") == "0":
        print(
            f"average {recipe.average}: a run of {steps} steps makes {made} checkpoints (save_steps "
            f"{recipe.save_steps}), and the mean is of these",
            file=sys.stderr,
        )
    return steps


def shuffled(recipe: Recipe, data: dict[str, PackedDataset], count: int) -> Epochs:
    """Returns so many sequences in the order in which the run learns them."""
    if not recipe.mix:
        return Epochs(data["train"], count, recipe.seed)
    others = [(data[f"mix: {name}"], share) for name, share in recipe.mix.items()]
    return Mixed(data["train"], others, count, recipe.seed)


def probe_of(recipe: Recipe, tokenizer: Any, run: Path) -> Any:
    """Returns the probe that measures retention while the run trains; None if the recipe names no rows for it."""
    if not recipe.retention or not recipe.probe_rows:
        return None
    rows = retention_rows(recipe)
    rows = rows.select(range(min(recipe.probe_rows, len(rows))))
    encoded = encode(rows, tokenizer, retention_template(recipe, rows), recipe.max_length, end=False)
    encoded.check(f"{recipe.retention}, test", recipe.max_bad_rows)
    sequences = PackedDataset(encoded.examples, recipe.max_length, pad_token_id(tokenizer))
    return Probe(sequences, run / "probe.jsonl")
