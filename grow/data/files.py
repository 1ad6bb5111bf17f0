"""Which files of a folder, or of a repository on the hub, hold the rows of a split.

They are looked for in this order: what a data set's card says (the YAML at the top of README.md, as on the hub); files
named after the split, alone or in numbered parts, on top, in a folder of the split's name or in `data/`; names that
have the split's name among their words; and, if no name has any split's, all files, which then are the split train. All
other files are ignored.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from grow.errors import UserError

CARD = "README.md"
FORMATS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".arrow", ".txt")
_PACKED = ("", ".gz", ".zst", ".xz", ".bz2", ".lz4")
_PART = r"([-_.]?\d+)?([-_.]of[-_.]\d+)?(-[0-9a-f]{8,})?"
# What `datasets` itself writes beside rows.
_FACTS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_CACHED = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow|tmp\w*(\.arrow)?")
"""What `datasets` leaves beside the files of save_to_disk, of rows that were mapped or shuffled."""
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def data_format(name: str) -> str:
    """Returns the format of a file's rows by its name, such as ".jsonl"; "" if it is none of FORMATS."""
    path = PurePosixPath(name)
    suffixes = [path.suffix, PurePosixPath(path.stem).suffix] if path.suffix.lower() in _PACKED else [path.suffix]
    return next((suffix for suffix in suffixes if suffix.lower() in FORMATS), "").lower()


def files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields the files of a folder and of those inside it, and those that links lead to.

    Raises UserError for a folder that cannot be read.
    """
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir():
            yield from files_below(entry.path, (*above, real))
        elif entry.is_file():
            yield Path(entry.path)


def split_files(
    names: list[str], read: Callable[[str], Path], split: str, data_dir: str | None, config: str | None, where: str
) -> list[str]:
    """Returns the files of a split, in order, all of one format; `read` gives the path of the card, by its name.

    `data_dir` is the folder inside to look in. `config` names a configuration of the card, or else a folder inside.
    `where` is what messages call the data. Raises UserError where there is no such split, or more than one reading of
    it.
    """
    prefix = _prefix(data_dir)
    inside, listed = (None, None) if prefix or CARD not in names else _of_card(read(CARD), split, config, where)
    if inside is not None:
        prefix = inside
    elif config:
        prefix += f"{config}/"
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"{where}: data_config {config}: neither its card nor a folder in it has that name")
    rows = [name.removeprefix(prefix) for name in sorted(names) if name.startswith(prefix)]
    rows = [name for name in rows if data_format(name) and not _hidden(name)]
    if listed is not None:
        found = [name for name in rows if any(_glob(pattern).fullmatch(name) for pattern in listed)]
    else:
        found = _named_after(rows, split) or _among_its_words(rows, split)
    if not found:
        raise UserError(f"{where}: no file in it holds its split {split} ({_what_there_is(rows)})")
    formats = {data_format(name) for name in found}
    if len(formats) > 1:
        raise UserError(f"{where}: its split {split} is there in several formats: {', '.join(found[:4])}; keep one")
    _check_parts(found, where)
    return [prefix + name for name in found]


def _prefix(folder: str | None) -> str:
    return f"{folder.removeprefix('./').strip('/')}/" if folder and folder.strip("./") else ""


def _hidden(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.name in _FACTS
        or _CACHED.fullmatch(path.name) is not None
        or any(part.startswith((".", "__")) for part in path.parts)
    )


def _named_after(names: list[str], split: str) -> list[str]:
    end = "(" + "|".join(map(re.escape, FORMATS)) + ")(" + "|".join(map(re.escape, _PACKED)) + ")"
    for form in (rf"{re.escape(split)}{end}", rf"{re.escape(split)}{_PART}{end}", rf"{re.escape(split)}/.*{end}"):
        for place in ("", "data/"):
            found = [name for name in names if re.fullmatch(place + form, name, re.IGNORECASE)]
            if found:
                return found
    return []


def _among_its_words(names: list[str], split: str) -> list[str]:
    def has(name: str, words: tuple[str, ...]) -> bool:
        return any(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name.lower()) for word in words)

    found = [name for name in names if has(name, _WORDS.get(split, (split.lower(),)))]
    if not found and split == "train" and not any(has(name, words) for name in names for words in _WORDS.values()):
        return names
    return found


def _check_parts(found: list[str], where: str) -> None:
    """Checks parts numbered like "3-of-8": a missing one would lose rows silently, and none may be there twice."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name in found:
        if part := re.search(r"\d+[-_.]of[-_.](\d+)[^/]*$", name):
            sets.setdefault((name[: part.start()], part[1]), []).append(name)
        packed = PurePosixPath(name)
        if packed.suffix.lower() in _PACKED and str(packed.with_suffix("")) in found:
            raise UserError(f"{where}: {packed.with_suffix('')} is there twice, as {name} too; keep one")
    for (_, count), parts in sets.items():
        if len(parts) % int(count):
            raise UserError(f"{where}: {len(parts)} of the {count} parts of {parts[0]} are there")


def _what_there_is(names: list[str]) -> str:
    if not names:
        return f"there is no file of rows; they end in {', '.join(FORMATS)}"
    return "there are: " + ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _of_card(card: Path, split: str, config: str | None, where: str) -> tuple[str | None, list[str] | None]:
    """Returns the folder inside that a card gives, "" for the top, and its patterns for a split there, if it has any;
    (None, None) where it names neither."""
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        if head and re.search(r"^[\s-]*data_(files|dir):", head[1], re.MULTILINE):
            raise UserError(f"{where}: its card is not YAML ({' '.join(str(error).split())})") from None
        facts = None
    configs = (facts.get("configs") or []) if isinstance(facts, dict) else []
    entries = [entry for entry in (configs if isinstance(configs, list) else [configs]) if isinstance(entry, dict)]
    named = {
        str(entry.get("config_name", "default")): entry
        for entry in entries
        if entry.get("data_files") or entry.get("data_dir")
    }
    if not named:
        return None, None
    if config is None:
        chosen = [name for name, entry in named.items() if entry.get("default")] or [
            name for name in named if name == "default" or len(named) == 1
        ]
        if not chosen:
            raise UserError(f"{where}: has the configurations {', '.join(named)}; name one in data_config")
        config = chosen[0]
    if config not in named:
        return None, None
    folder, files = named[config].get("data_dir"), named[config].get("data_files")
    return _prefix(str(folder) if folder else None), _patterns(files, split) if files else None


def _patterns(files: Any, split: str) -> list[str]:
    if isinstance(files, list) and all(isinstance(item, dict) for item in files):
        files = {str(item.get("split", "train")): item.get("path") for item in files}
    elif not isinstance(files, dict):
        files = {"train": files}
    patterns = files.get(split, [])
    return [str(pattern) for pattern in (patterns if isinstance(patterns, list) else [patterns])]


def _glob(pattern: str) -> re.Pattern[str]:
    """Compiles a path's pattern as on the hub: * within a folder, ** across folders, [0-9] one of these characters."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\])", pattern.removeprefix("./"))
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(part) or _characters(part) for part in parts))


def _characters(part: str) -> str:
    if part[:1] != "[" or len(part) < 3:
        return re.escape(part)
    inner = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
    return f"[^{inner[1:]}]" if inner[0] == "!" else f"[{inner}]"
