"""Whether a run that resumes is the run that began, by what its recipe says, not by how paths are typed.

A folder may have moved, even the run's own: its contents are compared, by checksums. A name on the hub is compared as
text.
"""

from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from grow.checkpoint.hub import HUB_NAME
from grow.checkpoint.shards import read_json
from grow.errors import UserError
from grow.recipe import Recipe
from grow.recipe_values import find_deepspeed, read_deepspeed
from grow.training.deepspeed_json import first_difference

NAME = "run.json"

# Fields that may differ when a run resumes: they change what it logs and keeps, not what it computes.
_FREE = {
    "logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "per_device_eval_batch_size",
    "probe_rows", "metric", "options", "retention_sets", "keep_best", "average", "early_stopping_patience",
    "dataloader_num_workers",
}  # fmt: skip
# The run's folder may have moved, and a DeepSpeed JSON is compared by its settings.
_ELSEWHERE = {"output_dir", "deepspeed"}
_PLACES = {"base", "grown", "data", "retention", "kl_text", "chat_template", "mix"}


def places(recipe: Recipe) -> dict[str, Any]:
    """Returns the entries of run.json that identify moved folders: which fields named folders (or files) of this
    machine, the settings of the DeepSpeed JSON, and checksums of the texts, beside the data, that a method reads."""
    return {
        "local": sorted(name for name in _PLACES if _is_local(recipe.values().get(name))),
        "deepspeed": read_deepspeed(recipe.deepspeed),
        "text_checksums": [_checksum(Path(text)) for text in recipe.make_method().texts_read(recipe)],
    }


def check_same_run(run: Path, recipe: Recipe) -> None:
    """Raises UserError if the folder holds a run by another recipe."""
    if not (run / NAME).exists():
        return
    before, now = read_json(run / NAME), recipe.values()
    old = before.get("recipe")
    if not isinstance(old, dict):
        raise UserError(f"{run / NAME}: not what a run writes; give another --output_dir or remove it")
    unused = set() if recipe.make_method().grows else {"grown", *recipe.growth}
    for name in [name for name in now if name not in _FREE | _ELSEWHERE | unused]:
        if name in old and not _is_same(name, old[name], now[name], before):
            raise UserError(
                f"{run}: holds a run with {name} {old[name]!r}, not {now[name]!r}; "
                f"give it as it was, or another --output_dir"
            )
    _check_deepspeed(run, recipe, before)
    if "text_checksums" in before and before["text_checksums"] != places(recipe)["text_checksums"]:
        texts = ", ".join(recipe.make_method().texts_read(recipe))
        raise UserError(
            f"{run}: holds a run that began with other contents of {texts}; put them back, or give another --output_dir"
        )


def _is_same(name: str, old: Any, now: Any, before: dict[str, Any]) -> bool:
    if old == now or name not in _PLACES:
        return bool(old == now)
    if isinstance(old, dict) and list(old.values()) != list(now.values()):
        return False
    was_local = name in before["local"] if isinstance(before.get("local"), list) else _was_local(old)
    # Checksums in run.json say whether the contents are the same; older files have none of general text.
    return was_local and _is_local(now) and (name != "kl_text" or "text_checksums" in before)


def _is_local(value: Any) -> bool:
    paths = list(value) if isinstance(value, (list, dict)) else [value]
    return bool(paths) and all(isinstance(path, str) and path and Path(path).exists() for path in paths)


def _was_local(value: Any) -> bool:
    """Guesses for a run.json that does not say: anything that could not be a name on the hub was local."""
    return _is_local(value) or (isinstance(value, str) and bool(value) and not HUB_NAME.fullmatch(value))


def _check_deepspeed(run: Path, recipe: Recipe, before: dict[str, Any]) -> None:
    old_path, said = str(before["recipe"].get("deepspeed", recipe.deepspeed)), before.get("deepspeed")
    if not isinstance(said, dict):  # written before it was kept
        if old_path == recipe.deepspeed:
            return
        try:
            said = read_deepspeed(find_deepspeed(str(run), old_path))
        except UserError:
            raise UserError(
                f"{run}: holds a run with the DeepSpeed JSON {old_path}, which is gone; put it back"
            ) from None
    differs = first_difference(said, read_deepspeed(recipe.deepspeed))
    if differs:
        raise UserError(
            f"{run}: holds a run with another {differs} in its DeepSpeed JSON ({old_path}) than {recipe.deepspeed}; "
            "give another --output_dir or put it back"
        )


def _checksum(path: Path) -> str | None:
    """Returns XXH3-128 of a file, or of a folder's data files and their names; None for a name on the hub."""
    if not path.exists():
        return None
    digest = xxh3_128()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if not file.name.startswith(".") and file.suffix != ".md":
            digest.update(str(file.relative_to(path)).encode() + b"\0")
            digest.update(file.read_bytes())
    return digest.hexdigest()
