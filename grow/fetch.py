"""A recipe's model and data into the Hugging Face cache, on a node that has network; the others run offline then."""

import contextlib
from pathlib import Path
from typing import Any

from grow.checkpoint.hub import HUB_NAME, locate
from grow.errors import UserError
from grow.recipe import Recipe

# What a checkpoint needs; not its weights once more in another format.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md")


def fetch(recipe: Recipe) -> dict[str, Any]:
    """Fetches what is not in the cache yet (HF_HOME; HF_TOKEN for gated models). Returns where it lies.

    Raises UserError where a licence was not accepted, a token is missing, a name is wrong or there is no network.
    """
    base = recipe.base if Path(recipe.base).is_dir() else _fetch_model(recipe.base)
    rows = {
        split: len(recipe.rows(split)) for split in (recipe.train_split, recipe.validation_split, recipe.test_split)
    }
    if recipe.retention:
        rows["retention"] = len(recipe.retention_rows())
    return {"base": base, "data": recipe.data, "rows": rows}


def _fetch_model(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder, and no name on the hub (organisation/model)")
    try:
        return snapshot_download(name, allow_patterns=list(_WANTED))
    except GatedRepoError:
        raise UserError(
            f"{name}: is gated: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN to a token of "
            "that account"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: not on the hub, or private: check the name, and HF_TOKEN") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        with contextlib.suppress(UserError):
            return str(locate(name))  # the network is gone, but it is here
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: cannot be fetched ({reason}); is there network on this node?") from None
