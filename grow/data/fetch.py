"""Fetches a recipe's model and data into the Hugging Face cache, on a node with network; other nodes then run
offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grow.checkpoint.hub import HUB_NAME, repository
from grow.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from grow.data.of_recipe import retention_rows, rows_of
from grow.errors import UserError
from grow.recipe import Recipe

# The files beside the weights: config, tokenizer, chat template, card, licence.
_BESIDE = (".json", ".model", ".txt", ".jinja", ".md", ".tiktoken")


def fetch(recipe: Recipe) -> dict[str, Any]:
    """Fetches what is not in the cache yet (HF_HOME; HF_TOKEN for gated models). Returns where it is.

    Raises UserError where a licence was not accepted, a token is missing, a name is wrong or there is no network.
    """
    base = recipe.base if Path(recipe.base).is_dir() else _fetch_model(recipe.base_name)
    rows = {
        split: len(rows_of(recipe, split)) for split in (recipe.train_split, recipe.validation_split, recipe.test_split)
    }
    if recipe.retention:
        rows["retention"] = len(retention_rows(recipe))
    return {"base": base, "data": recipe.data, "rows": rows}


def _fetch_model(name: str) -> str:
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder, and no name on the hub (organisation/model)")
    source = repository(name)

    def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
        beside = [
            n for n in names if (n.endswith(_BESIDE) and "/" not in n) or n.startswith("additional_chat_templates/")
        ]
        return sorted({*beside, *_weights(names, read, str(source))})

    return str(source.fetch(choose)[0].parent)


def _weights(names: list[str], read: Callable[[str], Path], where: str) -> list[str]:
    """Returns the files of weights that transformers loads, if a repository has them in several formats."""
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    if INDEX_NAME in names:
        return sorted(set(json.loads(read(INDEX_NAME).read_text())["weight_map"].values()))
    raise UserError(f"{where}: has neither {SINGLE_NAME} nor {INDEX_NAME}: its weights are in another format")
