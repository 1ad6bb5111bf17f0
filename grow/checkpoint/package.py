"""A grown checkpoint, taken apart and put together: the base back out of it, and the growth on its own.

growth package     growth-0000i-of-0000n.safetensors, growth.json: what a training run ends in, without the base
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grow.checkpoint.expand import grown_name, link_again, link_base
from grow.checkpoint.metadata import BASE_FOLDER, check_growth, read_growth, write_growth, write_metadata
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import Checkpoint, read_header
from grow.checkpoint.trained_weights import ExportFunction, TrainedWeights, as_trained, load_trained
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, file_checksums, parse_size, split_into_shards
from grow.errors import UserError


def _open_grown(
    path: str, start: str = "", tag: str = "", average: int = 1, export: ExportFunction = as_trained
) -> TrainedWeights:
    source = load_trained(path, start, tag, average, export)
    if source.plan is None:
        raise UserError(f"{path}: was not grown; there is no base and no growth to take out of it")
    return source


def extract_base(path: str, out: str) -> dict[str, Any]:
    """Writes OUT, the base that a grown checkpoint (or a run that started from one) grew from: the same files.

    Raises UserError if the base's files are not, by checksum, those that went in.
    """
    refuse_existing(Path(out))
    grown = _open_grown(path).start
    files = grown.config["growth"]["base"]["files"]
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
    average: int = 1,
    progress: Progress = no_progress,
    export: ExportFunction = as_trained,
) -> dict[str, Any]:
    """Writes OUT, the growth package of a run or a grown checkpoint. `start`, `tag`, `average`, `export`: see
    load_trained."""
    size = parse_size("--max-shard-size", max_shard_size)
    refuse_existing(Path(out))
    source = _open_grown(path, start, tag, average, export)
    grown = source.start
    known = {key: value for key, value in read_growth(grown.path).items() if key != "small_files"}
    added = source.growth()
    shards = split_into_shards(added, size, "growth")
    with OutputFolder(out, {"growth of": source.identity, "shards": list(shards)}) as folder:
        checksums = folder.write_shards(shards, progress)
        write_growth(folder, known | source.growth_facts() | {"tensors": checksums})
    return {"source": path, "out": out, "bytes": sum(tensor.nbytes for tensor in added.values())}


def attach_growth(base_path: str, package: str, out: str) -> dict[str, Any]:
    """Writes OUT, a growth package put on its base again.

    Raises UserError for another base than the one it grew from: growth is a difference from that base's every bit.
    """
    refuse_existing(Path(out))
    folder_in = Path(package)
    facts = read_growth(folder_in)
    shards = sorted(folder_in.glob("growth-*.safetensors"))
    added = {name: info for shard in shards for name, info in read_header(shard).items()}
    if set(added) != set(facts["tensors"]):
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
        write_metadata(folder, facts, own.config)
    return {"base": base_path, "growth": package, "out": out}


def set_layer_alphas(path: str, out: str, alphas: Sequence[float]) -> dict[str, Any]:
    """Writes OUT, the same grown checkpoint with another place of the dial in each grown layer at α = 1: every shard
    linked. Raises UserError if PATH is no grown checkpoint, or if these are no α, one a layer."""
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


def _check_base(where: Path, present: dict[str, Path], files: dict[str, Any]) -> None:
    if set(present) != set(files):
        raise UserError(f"{where}: has other files than the base of this growth, which has {', '.join(files)}")
    for name, facts in files.items():
        if not present[name].is_file() or file_checksums(present[name])[0] != facts["xxh3_128"]:
            raise UserError(f"{present[name]}: not the file that this growth grew from (checksum)")
