"""A grown checkpoint is taken apart and put together: the base is extracted, and the growth on its own.

A growth package is the result of a training run without the base: growth-0000i-of-0000n.safetensors and growth.json.
"""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from grow.checkpoint.card import base_facts
from grow.checkpoint.dtypes import is_float
from grow.checkpoint.expand import base_identity, grown_name, link_again, link_base
from grow.checkpoint.hub import HUB_NAME, repository
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.metadata import BASE_FOLDER, GROWTH_NAME, check_growth, read_growth, write_growth, write_metadata
from grow.checkpoint.one_skill import OneSkill, facts_of, has_skills, has_skills_at
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.starting import second_head
from grow.checkpoint.trained_weights import ExportFunction, TrainedWeights, as_trained, load_trained
from grow.checkpoint.writer import (
    GROWTH_SHARD_SIZE,
    checksum,
    file_checksums,
    files_of,
    parse_size,
    split_into_shards,
)
from grow.errors import UserError, one_line
from grow.names import canonical, is_growth, named_beside, own_name


def _open_grown(
    path: str, start: str = "", tag: str = "", average: int = 0, export: ExportFunction = as_trained
) -> TrainedWeights:
    source = load_trained(path, start, tag, average, export)
    if source.plan is None:
        raise UserError(f"{path}: was not grown; there is no base and no growth to take out of it")
    return source


def extract_base(path: str, out: str) -> dict[str, Any]:
    """Writes OUT, the base that a grown checkpoint (or a run that started from one) grew from: the same files.

    Raises UserError if the checksums of the base's files are not those of the files that were grown.
    """
    refuse_existing(Path(out))
    grown = Checkpoint(path) if has_skills_at(path) else _open_grown(path).start
    base = grown.config["growth"]["base"]
    files = base["files"]
    if not (grown.path / BASE_FOLDER).is_dir():
        raise UserError(
            f"{path}: does not hold its base's files, as a checkpoint that Trainer wrote; its base is {base['name']}"
        )
    _check_base(grown.path, {name: grown.path / name for name in files}, files)
    with OutputFolder(out, {"base of": grown.identity()}) as folder:
        for name, facts in files.items():
            folder.link(grown.path / name, facts["name"])
        for file in side_files(grown.path):
            folder.copy(file)
        for file in sorted((grown.path / BASE_FOLDER).iterdir(), key=lambda file: file.name == "config.json"):
            folder.copy(file)
    return {"source": path, "out": out, "files": [facts["name"] for facts in files.values()]}


def extract_growth(
    path: str,
    out: str,
    max_shard_size: str = GROWTH_SHARD_SIZE,
    start: str = "",
    tag: str = "",
    average: int = 0,
    progress: Progress = no_progress,
    export: ExportFunction = as_trained,
    name: str = "",
) -> dict[str, Any]:
    """Writes OUT, the growth package of a run or a grown checkpoint, or of the skill `name` of one that has several.
    `start`, `tag`, `average`, `export`: see load_trained."""
    size = parse_size("--max-shard-size", max_shard_size)
    refuse_existing(Path(out))
    if name:
        return _extract_skill(Checkpoint(path), name, out, size, progress)
    source = _open_grown(path, start, tag, average, export)
    grown = source.start
    known = {key: value for key, value in read_growth(grown.path).items() if key != "small_files"}
    added = source.growth()
    shards = split_into_shards(added, size, "growth")
    with OutputFolder(out, {"growth of": source.identity, "shards": list(shards)}) as folder:
        checksums = folder.write_shards(shards, progress)
        write_growth(folder, known | source.growth_facts() | {"tensors": checksums})
    return {"source": path, "out": out, "bytes": sum(tensor.nbytes for tensor in added.values())}


def _extract_skill(whole: Checkpoint, name: str, out: str, max_shard_size: int, progress: Progress) -> dict[str, Any]:
    """Writes OUT, the package of one of several skills: the tensors that went in."""
    if not has_skills(whole.config):
        raise UserError(f"{whole.path}: --name {name}: holds no several skills; leave --name out")
    one = OneSkill(whole, name)
    added = {key: one.lazy(key) for key in one.tensors if is_growth(key)}
    shards = split_into_shards(added, max_shard_size, "growth")
    with OutputFolder(out, {"growth of": one.identity(), "skill": name, "shards": list(shards)}) as folder:
        checksums = folder.write_shards(shards, progress)
        write_growth(folder, facts_of(one.path, name) | {"tensors": checksums})
    return {"source": str(whole.path), "out": out, "bytes": sum(tensor.nbytes for tensor in added.values())}


def attach_growth(base_path: str, package: str, out: str) -> dict[str, Any]:
    """Writes OUT, a grown checkpoint: the base with a growth package (a folder, or a name on the hub).

    Growth is put in the base's dtype; "rounded" in the result says so where that is another than the package's.

    Raises UserError for another base than the one it grew from: growth is a difference from that base's every bit.
    """
    refuse_existing(Path(out))
    facts, added = open_package(package)
    own = Checkpoint(base_path)
    if "growth" in own.config:
        raise UserError(f"{base_path}: is grown already; give its base (grow base {quote(base_path)} OUT)")
    base = check_same_base(own, facts)
    made = added_as_of(own, added)
    with OutputFolder(out, {"attach": [own.identity(), [str(s.resolve()) for s in added.shards]]}) as folder:
        link_base(folder, own)
        before, after = ({name: one.dtype for name, one in of.items()} for of in (added.tensors, made))
        if before == after:
            for shard in added.shards:
                folder.link(shard, shard.name)
            weight_map = {name: info.file.name for name, info in added.tensors.items()}
            sizes = {name: info.nbytes for name, info in added.tensors.items()}
        else:
            new = split_into_shards(made, parse_size("--max-shard-size", GROWTH_SHARD_SIZE), "growth")
            facts = facts | {"tensors": folder.write_shards(new, no_progress)}
            weight_map, sizes = files_of(new), {name: tensor.nbytes for name, tensor in made.items()}
        weight_map |= {name: grown_name(info.file) for name, info in own.tensors.items()}
        folder.write_index(weight_map, sizes | {name: info.nbytes for name, info in own.tensors.items()})
        write_metadata(folder, facts | base, own.config)
    changed = sorted(set(before.values()) - set(after.values()))
    rounded = {"rounded": f"{', '.join(changed)} to {', '.join(sorted(set(after.values())))}"} if changed else {}
    return {"base": base_path, "growth": package, "out": out} | rounded


def package_folder(name: str) -> Path:
    """Returns the folder of a growth package: `name` itself, or a hub repository's, fetched if it is not in the cache.

    Raises UserError if there is none.
    """
    if Path(name).is_dir() or not HUB_NAME.fullmatch(name):
        return Path(name)
    source = repository(name)

    def choose(names: list[str], _: object) -> list[str]:
        if GROWTH_NAME not in names:
            raise UserError(f"{source}: has no {GROWTH_NAME}, so it is not a growth package")
        return [GROWTH_NAME, *(one for one in names if one.startswith("growth-"))]

    return (source.cached(choose) or source.fetch(choose))[0].parent


def open_package(name: str) -> tuple[dict[str, Any], Checkpoint]:
    """Opens a growth package, a folder or a name on the hub: what its growth.json says, and its tensors.

    Raises UserError if it is not one, or not as it was written.
    """
    folder = package_folder(name)
    facts, shards = read_growth(folder), sorted(folder.glob("growth-*.safetensors"))
    added = Checkpoint.of_files(folder, shards)
    if set(added.tensors) != set(facts["tensors"]):
        raise UserError(f"{name}: its shards do not hold the tensors that its growth.json names; is one missing?")
    for shard in shards:
        for tensor, digest in file_checksums(shard)[1].items():
            if digest != facts["tensors"][tensor]:
                raise UserError(f"{shard}: {tensor} changed since it was written (checksum)")
    return facts, added


def matches(tensor: LazyTensor, digest: str | None) -> bool:
    """Says whether a tensor has this checksum, as it is or rounded to another float type."""
    if digest is None:
        return False
    others = ("BF16", "F16", "F32") if is_float(tensor.dtype) else ()
    return any(checksum(tensor.to(dtype)) == digest for dtype in dict.fromkeys((tensor.dtype, *others)))


def check_same_base(own: Checkpoint, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns what is known of the base beyond the package, since growth saved from memory may know only the tensors,
    in the type in which they were loaded.

    Raises UserError for another base.
    """
    files = facts["base"]["files"]
    if files:
        return {"base_tensors": _check_base(own.path, {grown_name(shard): shard for shard in own.shards}, files)}
    check_base_tensors(own, facts)
    files, tensors = base_identity(own)
    return {"base": {**base_facts(own), "files": files}, "base_tensors": tensors}


def check_base_tensors(own: Checkpoint, facts: dict[str, Any], files: Checkpoint | None = None) -> None:
    """Raises UserError if a tensor of the base is not the one that growth grew from, by its checksum; nor the same
    rounded, which only the `files` that it was loaded from can tell."""
    known = {canonical(name): digest for name, digest in facts["base_tensors"].items()}
    on_disk = {canonical(name): files.lazy(name) for name in files.tensors} if files else {}
    tied = second_head(own) or ("",)
    for name in own.tensors:
        digest, before = known.get(canonical(name)), on_disk.get(canonical(name))
        if name == tied[0] or matches(own.lazy(name), digest):
            continue
        if before is None or not (matches(before, digest) and matches(before, checksum(own.lazy(name)))):
            raise UserError(f"{own.path}: the growth grew from another base, {facts['base']['name']}: {name} differs")


def added_as_of(own: Checkpoint, added: Checkpoint) -> dict[str, LazyTensor]:
    """Returns a package's tensors as they go with a base: by its names, and in its dtype. Growth that was saved from
    memory may have others."""
    beside = {canonical(name): name for name in own.tensors}
    found = {}
    for name in added.tensors:
        own_tensor = beside.get(canonical(own_name(name)), "")
        if not is_growth(name) or not own_tensor:
            raise UserError(f"{added.path}: {one_line(name)}: is no growth of {own.path}")
        found[named_beside(name, own_tensor)] = added.lazy(name).to(own.tensors[own_tensor].dtype)
    return found


def set_layer_alphas(path: str, out: str, alphas: Sequence[float]) -> dict[str, Any]:
    """Writes OUT, the same grown checkpoint with its shards linked, and an α for each grown layer.

    Raises UserError if PATH is not a grown checkpoint, or if `alphas` are not one valid α for each of those layers.
    """
    refuse_existing(Path(out))
    source = _open_grown(path)
    grown, known = source.start, read_growth(source.start.path)
    facts = check_growth(known | {"alphas": list(alphas)}, Path(out))
    with OutputFolder(out, {"alphas of": source.identity, "alphas": list(alphas)}) as folder:
        link_again(folder, grown, grown.shards)
        weight_map = {name: info.file.name for name, info in grown.tensors.items()}
        folder.write_index(weight_map, {name: info.nbytes for name, info in grown.tensors.items()})
        write_metadata(folder, facts, grown.config)
    return {"source": path, "out": out, "layers": facts["layers"], "alphas": list(alphas)}


def _check_base(where: Path, present: dict[str, Path], files: dict[str, Any]) -> dict[str, str]:
    """Returns the checksums of a base's tensors. Raises UserError where its files are not those."""
    tensors: dict[str, str] = {}
    if set(present) != set(files):
        raise UserError(f"{where}: has other files than the base of this growth, which has {', '.join(files)}")
    for name, facts in files.items():
        whole, own = file_checksums(present[name]) if present[name].is_file() else ("", {})
        if whole != facts["xxh3_128"]:
            raise UserError(f"{present[name]}: not the file that this growth grew from (checksum)")
        tensors |= own
    return tensors
