"""The data that a recipe names: rows, tokenizer, the template that turns a row into text, packed sequences."""

import dataclasses
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from grow.data.images import PlacedImages
from grow.data.load import load_rows
from grow.data.packing import PackedDataset
from grow.data.rows import Rows
from grow.data.template import Template
from grow.data.tokenizer import load_tokenizer, pad_token_id
from grow.data.tokens import encode_cached
from grow.errors import UserError
from grow.recipe import Recipe


def rows_of(recipe: Recipe, split: str) -> Rows:
    """Returns the rows of one split of the recipe's data."""
    rows = load_rows(recipe.data, split, recipe.data_revision, recipe.data_dir, recipe.data_config)
    return _placed(rows, recipe, recipe.data, recipe.data_dir)


def _placed(rows: Rows, recipe: Recipe, data: str, data_dir: str | None = None) -> Rows:
    """Returns rows of some data as they are, or, where the recipe has images, with names of these from its folder."""
    return PlacedImages(rows, recipe.images, _image_root(data, data_dir)) if recipe.images else rows


def retention_rows(recipe: Recipe, split: str = "test", folder: str = "") -> Rows:
    """Returns the rows of `retention`, or of another folder; "FOLDER[:80]" means the first 80."""
    path, part = sliced(folder or str(recipe.retention))
    return _placed(load_rows(path, split + part), recipe, path)


def read_sequences(recipe: Any, tokenizer: Any, split: str) -> PackedDataset:
    """Returns one split of a grow.recipe.Recipe's data, packed; bad rows are named on stderr. Raises UserError if too
    many rows, or all, cannot be used."""
    encoded = encode_cached(rows_of(recipe, split), tokenizer, template_of(recipe), recipe.max_length)
    encoded.check(f"{recipe.data}, {split}", recipe.max_bad_rows)
    return PackedDataset(encoded.examples, recipe.max_length, pad_token_id(tokenizer), recipe.seed)


def mixed_rows(recipe: Recipe) -> Iterator[tuple[str, Rows, Template]]:
    """Yields the data sets that are mixed in: name, rows, and how a row becomes text, by the recipe's template if they
    have its columns, else a prompt and its completion, or a text, all of which is learnt."""
    if not recipe.mix:
        return
    own = template_of(recipe)
    for folder in recipe.mix:
        path, part = sliced(folder)
        rows = _placed(load_rows(path, "train" + part), recipe, path)
        yield folder, rows, with_images(other_template(rows, own), recipe, rows, path)


def read_mixed(recipe: Recipe, tokenizer: Any) -> dict[str, PackedDataset]:
    """Returns the data sets that are mixed in, packed, by the names that `mix` gives them. Raises UserError as
    read_sequences does."""
    if not recipe.mix:
        return {}
    own, found = template_of(recipe), {}
    for folder, rows, template in mixed_rows(recipe):
        as_own = (template.prompt, template.completion) == (own.prompt, own.completion)
        whole = as_own or "{text}" not in template.completion  # another's text may be a part of one
        encoded = encode_cached(rows, tokenizer, template, recipe.max_length, end=whole)
        encoded.check(f"mix: {folder}", recipe.max_bad_rows)
        found[folder] = PackedDataset(encoded.examples, recipe.max_length, pad_token_id(tokenizer), recipe.seed)
    return found


def other_template(rows: Rows, template: Template) -> Template:
    """Returns how rows of another data set become text: by the recipe's template if they have its columns, else by
    columns called prompt and completion, or text."""
    template = dataclasses.replace(template, images="", image_root="")
    columns = set(rows.columns(["text", "prompt", "completion", *template.columns()]))
    if set(template.columns()) <= columns:
        return template
    only_text = "text" in columns and not {"prompt", "completion"} <= columns
    return Template("", "{text}") if only_text else Template("{prompt}", "{completion}")


def sliced(folder: str) -> tuple[str, str]:
    """Splits "FOLDER[:80]" into its path, and the part of its rows as datasets writes it: "[:80]", or "" for all."""
    path, bracket, part = folder.partition("[:")
    return path, bracket + part


def tokenizer_of(recipe: Recipe) -> Any:
    """Returns the tokenizer of the checkpoint that training starts from, or of the base if that has not grown yet.

    Raises UserError where there is none.
    """
    return load_tokenizer(recipe.start if os.path.isdir(recipe.start) else recipe.base_name)


def template_of(recipe: Recipe) -> Template:
    """Returns how a row of the recipe's data becomes text: by its templates, or else by the names of the data's
    columns.

    Raises UserError where there is neither.
    """
    own = _chat_template(recipe.chat_template) if recipe.chat_template else ""
    images = (recipe.images, _image_root(recipe.data, recipe.data_dir) if recipe.images else "")
    if recipe.completion or recipe.messages:
        return Template(recipe.prompt, recipe.completion, recipe.messages, own, recipe.day, *images)
    where = (recipe.data, recipe.train_split, recipe.data_revision, recipe.data_dir, recipe.data_config)
    return Template(*_by_columns(where), own, recipe.day, *images)


def _image_root(data: str, data_dir: str | None = None) -> str:
    """Returns the folder that paths of images are relative to: that of the data."""
    folder = Path(data) if os.path.isdir(data) else Path(data).parent
    return os.path.abspath(folder / (data_dir or ""))


def with_images(template: Template, recipe: Recipe, rows: Rows, folder: str) -> Template:
    """Returns a template of another data set, in `folder`, whose rows have images if they have the recipe's column."""
    if not recipe.images or recipe.images not in rows.columns([recipe.images]):
        return dataclasses.replace(template, images="", image_root="")
    return dataclasses.replace(template, images=recipe.images, image_root=_image_root(folder))


@cache
def _by_columns(where: tuple[str, str, str | None, str | None, str | None]) -> tuple[str, str, str]:
    """Returns prompt, completion and messages of rows that have columns of these names."""
    columns = load_rows(*where).columns(["prompt", "completion"])
    if "messages" in columns:
        return "", "", "messages"
    if {"prompt", "completion"} <= set(columns):
        return "{prompt}", "{completion}", ""
    raise UserError(
        f"{where[0]}: give prompt and completion, templates of its columns ({', '.join(columns)}), or messages, the "
        "name of a column of chat messages"
    )


def retention_template(recipe: Recipe, rows: Rows | None = None) -> Template:
    """Returns how a row of `retention` becomes text; of `rows` also its images, if they have the recipe's column."""
    template = Template(recipe.retention_prompt, recipe.retention_completion)
    return template if rows is None else with_images(template, recipe, rows, sliced(str(recipe.retention))[0])


def right_option(recipe: Recipe, row: Any) -> str:
    """Returns the option that is a row's own completion. Raises UserError if none is, ValueError for a bad row."""
    wanted = template_of(recipe).fill(recipe.completion, row)
    if wanted not in recipe.options:
        raise UserError(
            f"options: {wanted!r}, the completion of a row, is not among {recipe.options}; they are written as the "
            "template writes completions, with the space before them"
        )
    return wanted


def _chat_template(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: {file}: cannot be read ({error})") from None
    if not text.strip():
        raise UserError(f"chat_template: {file}: is empty")
    return text
