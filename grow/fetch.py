"""Brings what a recipe names on the Hugging Face hub into the local cache, where training looks for it.

    python -m grow.fetch RECIPE [--field value …]

Run where there is a network; HF_HOME says where the cache is, HF_TOKEN (or `hf auth login`) opens gated models.
"""

import sys
from typing import Any

from grow.arguments import checked
from grow.checkpoint.hub import locate
from grow.errors import UserError, one_line
from grow.recipe import Recipe, read_recipe
from grow.tasks import load_rows

# Of a model's repository: weights, configurations, the tokenizer. Not the same weights in other formats.
PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "LICENSE*", "README.md"]


def fetch(recipe: str, **fields: str) -> Recipe:
    """Brings the base model and all splits. Raises UserError, one line, that says what is missing for it."""
    settings = read_recipe(recipe, fields)
    print(f"base: {_model(settings.base)}")
    for split in (settings.train_split, settings.validation_split, settings.test_split):
        rows = load_rows(settings.data, split, settings.data_revision, settings.data_config)
        settings.template.check(rows.column_names)
        print(f"data: {settings.data}, {split}: {len(rows)} rows")
    return settings


def _model(base: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        return str(locate(base))
    page = f"https://huggingface.co/{base}"
    try:
        return snapshot_download(base, allow_patterns=PATTERNS)
    except GatedRepoError:
        raise UserError(f"{base}: is gated; accept its licence at {page} and set HF_TOKEN to your token") from None
    except RepositoryNotFoundError:
        raise UserError(f"{base}: there is no such model on the hub, or HF_TOKEN may not see it ({page})") from None
    except (HfHubHTTPError, OSError) as error:
        try:
            return str(locate(base))  # the network is gone, but it is here
        except UserError:
            raise UserError(f"{base}: cannot be fetched ({str(error).splitlines()[0]})") from None


def main(arguments: list[str]) -> int:
    """Exit code: 0, or 2 if something is missing."""
    commands: dict[str, Any] = {"fetch": fetch}
    try:
        _, *words = checked(["fetch", *arguments], commands)
        import fire

        fire.Fire(lambda *a, **k: fetch(*a, **k) and None, command=words, name="grow.fetch")
    except UserError as error:
        print(f"grow: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
