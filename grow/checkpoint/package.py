"""A grown checkpoint, taken apart and put together: the base back out of it, and the growth on its own.

growth package     growth-0000i-of-0000n.safetensors, growth.json: what a training run ends in, without the base
"""

from pathlib import Path
from typing import Any

from grow.checkpoint.card import grown_card
from grow.checkpoint.expand import BASE_FOLDER, grown_name, link_base
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import Checkpoint, read_header, read_json
from grow.checkpoint.source import Source, open_source
from grow.checkpoint.writer import MAX_SHARD_SIZE, file_checksums, parse_size, split_into_shards
from grow.errors import UserError
from grow.plan import GrowthPlan


def _open_grown(path: str, start: str = "", tag: str = "") -> Source:
    source = open_source(path, start, tag)
    if source.plan is None:
        raise UserError(f"{path}: was not grown; there is no base and no growth to take out of it")
    return source


def base(path: str, out: str) -> dict[str, Any]:
    """Writes OUT, the base that a grown checkpoint (or a run that started from one) grew from: the same files.

    Raises UserError if the base's files are not, by checksum, those that went in.
    """
    refuse_existing(Path(out))
    grown = _open_grown(path).start
    files = grown.config["growth"]["base"]["files"]
    _check_base(grown.path, {name: grown.path / name for name in files}, files)
    with OutputFolder(out, {"base of": grown.identity()}) as folder:
        for name, facts in files.items():
            if Path(facts["name"]).name != facts["name"]:
                raise UserError(f"{grown.path}: {facts['name']!r} in its growth is not a plain file name")
            folder.link(grown.path / name, facts["name"])
        for file in side_files(grown.path):
            folder.copy(file)
        for file in sorted((grown.path / BASE_FOLDER).iterdir(), key=lambda file: file.name == "config.json"):
            folder.copy(file)
    return {"source": path, "out": out, "files": [facts["name"] for facts in files.values()]}


def growth(
    path: str,
    out: str,
    max_shard_size: str = f"{MAX_SHARD_SIZE}",
    start: str = "",
    tag: str = "",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Writes OUT, the growth package of a run or a grown checkpoint."""
    size = parse_size("--max-shard-size", max_shard_size)
    refuse_existing(Path(out))
    source = _open_grown(path, start, tag)
    grown = source.start
    added = source.growth()
    shards = split_into_shards(added, size, "growth")
    with OutputFolder(out, {"growth of": source.identity, "shards": list(shards)}) as folder:
        checksums = folder.write_shards(shards, progress)
        facts = source.growth_facts()
        folder.write_text("README.md", grown_card(facts))
        known = read_json(grown.path / "growth.json")
        folder.write_json("growth.json", known | facts | {"tensors": checksums})
    return {"source": path, "out": out, "bytes": sum(tensor.nbytes for tensor in added.values())}


def attach(base_path: str, package: str, out: str) -> dict[str, Any]:
    """Writes OUT, a growth package put on its base again.

    Raises UserError for another base than the one it grew from: growth is a difference from that base's every bit.
    """
    refuse_existing(Path(out))
    folder_in = Path(package)
    facts = read_json(folder_in / "growth.json")
    plan = GrowthPlan.from_config({"growth": facts})
    shards = sorted(folder_in.glob("growth-*.safetensors"))
    added = {name: info for shard in shards for name, info in read_header(shard).items()}
    if plan is None or set(added) != set(facts["tensors"]):
        raise UserError(f"{package}: its shards do not hold the tensors that its growth.json names; is one missing?")
    own = Checkpoint(base_path)
    if "growth" in own.config:
        raise UserError(f"{base_path}: is grown already; give its base (python -m grow base {base_path} OUT)")
    _check_base(own.path, {grown_name(shard): shard for shard in own.shards}, facts["base"]["files"])
    for shard in shards:
        for name, checksum in file_checksums(shard)[1].items():
            if checksum != facts["tensors"][name]:
                raise UserError(f"{shard}: {name} changed since it was written (checksum)")
    with OutputFolder(out, {"attach": [own.identity(), [str(s.resolve()) for s in shards]]}) as folder:
        link_base(folder, own)
        for shard in shards:
            folder.link(shard, shard.name)
        weight_map = {name: grown_name(info.file) for name, info in own.tensors.items()}
        weight_map |= {name: info.file.name for name, info in added.items()}
        folder.write_index(weight_map, {name: info.nbytes for name, info in (own.tensors | added).items()})
        small = {key: value for key, value in facts.items() if key not in ("tensors", "base_tensors")}
        folder.write_json("growth.json", facts)
        folder.write_text("README.md", grown_card(small))
        folder.write_json("config.json", own.config | {"growth": small})
    return {"base": base_path, "growth": package, "out": out}


def _check_base(where: Path, present: dict[str, Path], files: dict[str, Any]) -> None:
    if set(present) != set(files):
        raise UserError(f"{where}: has other files than the base of this growth, which has {', '.join(files)}")
    for name, facts in files.items():
        if not present[name].is_file() or file_checksums(present[name])[0] != facts["sha256"]:
            raise UserError(f"{present[name]}: not the file that this growth grew from (checksum)")
