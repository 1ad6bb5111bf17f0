"""Where a checkpoint is: a folder, or a name on the Hugging Face hub that is in the local cache."""

import os
import re
from pathlib import Path

from grow.errors import UserError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint. Nothing is fetched: a hub name must be in the cache (HF_HOME) already.

    Raises UserError if there is none.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not HUB_NAME.fullmatch(str(name)):
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
        raise UserError(
            f"{name}: no such folder, and not in the Hugging Face cache; fetch it: hf download {name}"
        ) from None


def hub_name(path: Path) -> str | None:
    """The hub's name of a cached snapshot, "organisation/model"; None for any other folder."""
    match = _SNAPSHOT.search(str(path.absolute()))
    return f"{match[1]}/{match[2]}" if match else None
