"""Where a checkpoint is: a folder, or a name on the Hugging Face hub that is in the local cache.

Only the public layout and functions of the hub's cache (HF_HOME) are used: a snapshot's folder holds the files that
were fetched, and the list of the repository's files beside it tells which were not.
"""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from grow.errors import UserError, innermost

FROM_FOLDER = {"local_files_only": True, "trust_remote_code": False}
"""How transformers is to read a folder: without a network, and without asking whether to run code that lies in it."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")

Choose = Callable[[list[str], Callable[[str], Path]], list[str]]
"""Chooses the wanted files of a repository by their names; it may ask for the path of a small one to read it."""


@dataclass(frozen=True)
class Repository:
    """Identifies one revision (a branch, a tag or a commit) of a repository on the hub; `kind` is "model" or
    "dataset"."""

    name: str
    kind: str = "model"
    revision: str = "main"

    def folder(self) -> Path | None:
        """Returns the snapshot's folder in the cache; None if nothing of it is there."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        store = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)
        ref = store / "refs" / self.revision
        commit = ref.read_text().strip() if ref.is_file() else self.revision
        snapshot = store / "snapshots" / commit
        return snapshot if commit and snapshot.is_dir() else None

    def listed(self) -> list[str] | None:
        """Returns the names of all files, fetched or not; None where the cache has no list, as in older versions."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with contextlib.suppress(CachedRepoTreeNotFoundError, ValueError):
            return sorted(file.path for file in get_cached_repo_tree(
                self.name, repo_type=self.kind, revision=self.revision))  # fmt: skip
        return None

    def names(self) -> list[str]:
        """Returns the names of the files as far as the cache knows them."""
        if (names := self.listed()) is not None:
            return names
        folder = self.folder()
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder else []

    def cached(self, choose: Choose) -> list[Path] | None:
        """Returns the chosen files, or None unless all of them are in the cache.

        Raises UserError as `choose` does, if the cache knows all names.
        """
        folder = self.folder()
        if folder is None:
            return None

        def read(name: str) -> Path:
            if not (folder / name).is_file():
                raise UserError(f"{self}: its {name} is not in the Hugging Face cache")
            return folder / name

        try:
            paths = [folder / name for name in choose(self.names(), read)]
        except UserError:
            if self.listed() is None:
                return None
            raise
        return paths if all(path.is_file() for path in paths) else None

    def fetch(self, choose: Choose) -> list[Path]:
        """Fetches the chosen files, and no others, unless they are there in their newest state.

        Raises UserError where a licence was not accepted, a token is missing, a name is wrong or there is no network.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # a repository without a card is no mistake

        def bring(*names: str) -> Path:
            patterns = [escape(name) for name in names]
            return Path(
                snapshot_download(self.name, repo_type=self.kind, revision=self.revision, allow_patterns=patterns)
            )

        address = f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        try:
            bring("README.md")  # and the list of files
            names = choose(self.names(), lambda name: bring(name) / name)
            folder = bring(*names)
        except GatedRepoError:
            raise UserError(
                f"{self}: is gated: accept its licence at {address}, then set HF_TOKEN to a token of that account"
            ) from None
        except RevisionNotFoundError:
            raise UserError(f"{self}: has no revision {self.revision}") from None
        except (RepositoryNotFoundError, HFValidationError):
            raise UserError(f"{self}: not on the hub, or private: check the name, and HF_TOKEN") from None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            with contextlib.suppress(UserError):
                if (paths := self.cached(choose)) is not None:
                    return paths  # the network is gone, but it is here
            raise UserError(f"{self}: cannot be fetched ({innermost(error)}); is there network on this node?") from None
        return [folder / name for name in names]

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


def repository(name: str) -> Repository:
    """Returns the model of a hub name, "organisation/model" or "organisation/model@revision"."""
    plain, _, revision = name.partition("@")
    return Repository(plain, revision=revision or "main")


def locate(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint. Nothing is fetched: a hub name must be in the cache (HF_HOME) already.

    Raises UserError if there is none.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not HUB_NAME.fullmatch(str(name)):
        raise UserError(f"{name}: no such folder")
    folder = repository(str(name)).folder()
    if folder is None:
        plain, _, revision = str(name).partition("@")
        raise UserError(
            f"{name}: no such folder, and not in the Hugging Face cache; fetch it with launch/prepare.sh RECIPE, or: "
            f"hf download {plain}{' --revision ' + revision if revision else ''}"
        )
    return folder


def hub_name(path: Path) -> str | None:
    """Returns the hub's name of a cached snapshot, "organisation/model"; None for any other folder."""
    match = _SNAPSHOT.search(str(path.absolute()))
    return f"{match[1]}/{match[2]}" if match else None
