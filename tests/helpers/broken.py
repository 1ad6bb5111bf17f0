"""Ways to break a checkpoint made by hand (tests/helpers/checkpoints.py), and what must be said of each."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grow.checkpoint.shards import INDEX_NAME
from tests.helpers.checkpoints import edit_json, join_file, split_file, write_index

SHARD = "model-00001-of-00002.safetensors"
SINGLE, GROWTH_SHARD = "model-00001-of-00001.safetensors", "growth-00001-of-00001.safetensors"
Break = Callable[[Path], object]


def header(change: Callable[[dict[str, Any]], Any], shard: str = SHARD) -> Break:
    """Replaces a shard's header by what `change` makes of it; what it returns, if it returns anything."""

    def apply(path: Path) -> None:
        entries, data = split_file(path / shard)
        join_file(path / shard, change(entries) or entries, data)

    return apply


def entry(**values: Any) -> Break:
    return header(lambda entries: entries["model.embed_tokens.weight"].update(values))


def index(**weight_map: Any) -> Break:
    return lambda path: edit_json(
        path / INDEX_NAME, weight_map=json.loads((path / INDEX_NAME).read_text())["weight_map"] | weight_map
    )


def config(**values: Any) -> Break:
    return lambda path: edit_json(path / "config.json", **values)


def text(name: str, content: bytes) -> Break:
    return lambda path: (path / name).write_bytes(content)


def nan(path: Path) -> None:
    entries, data = split_file(path / SHARD)
    begin, end = entries["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    join_file(path / SHARD, entries, data[:begin] + b"\xff" * (end - begin) + data[end:])


def renamed_shards(*names: str) -> Break:
    """The same shards, under names of which the index tells the truth."""

    def apply(path: Path) -> None:
        weight_map = json.loads((path / INDEX_NAME).read_text())["weight_map"]
        old = sorted(set(weight_map.values()))
        new = dict(zip(old, names, strict=False))
        for before, after in new.items():
            (path / before).rename(path / after)
        write_index(path, {key: new.get(file, file) for key, file in weight_map.items()})

    return apply


def twice(path: Path) -> None:
    entries, data = split_file(path / SHARD)
    text = json.dumps(entries).encode()
    join_file(path / SHARD, text[:-1] + b"," + text[1:], data)


def cut(place: int) -> Break:
    return lambda path: os.truncate(path / SHARD, (path / SHARD).stat().st_size + place if place < 0 else place)


def fifo(name: str) -> Break:
    def apply(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return apply


def bias(shape: list[int]) -> Break:
    def add(entries: dict[str, Any]) -> None:
        end = max(info["data_offsets"][1] for name, info in entries.items() if name != "__metadata__")
        entries["model.layers.0.mlp.gate_proj.bias"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2]}

    def apply(path: Path) -> None:
        with (path / SHARD).open("ab") as file:
            file.write(b"\0\0")
        header(add)(path)

    return apply


def rename_tensor(old: str, new: str) -> Break:
    def renamed(held: dict[str, Any]) -> dict[str, Any]:
        return {name.replace(old, new): value for name, value in held.items()}

    def apply(path: Path) -> None:
        for shard in path.glob("*.safetensors"):
            header(renamed, shard.name)(path)
        write_index(path, renamed(json.loads((path / INDEX_NAME).read_text())["weight_map"]))

    return apply


DEEP = b"[" * 5000 + b"]" * 5000
BROKEN: dict[str, tuple[Break, str]] = {
    "cut in the header": (cut(50), "cut short"),
    "cut in the data": (cut(-1), "fetch it again"),
    "empty": (cut(0), "cut short"),
    "a header longer than the file": (text(SHARD, struct.pack("<Q", 10**6) + b"{}"), "cut short"),
    "a header beyond reason": (text(SHARD, struct.pack("<Q", 2**63) + b"{}"), "cut short"),
    "a header that is a list": (header(lambda _: [1]), "header is broken"),
    "a header nested deep": (header(lambda _: DEEP), "header is broken"),
    "a header with a number of 10,000 digits": (header(lambda _: b'{"a":' + b"9" * 10_000 + b"}"), "header is broken"),
    "a name twice in a header": (twice, "header is broken"),
    "half a surrogate in a name": (rename_tensor("model.embed", "\ud800"), "header is broken"),
    "overlapping offsets": (header(lambda e: e[max(e)].update(data_offsets=[0, 256])), "the place of"),
    "offsets out of range": (entry(data_offsets=[0, 10**15]), "the place of"),
    "offsets backwards": (entry(data_offsets=[512, 0]), "the place of"),
    "negative offsets": (entry(data_offsets=[-512, 0]), "the place of"),
    "offsets that are text": (entry(data_offsets="ab"), "header is broken|the place of"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), "header is broken"),
    "huge dimensions": (entry(shape=[2**40, 2**40]), "has an invalid shape"),
    "huge dimensions and a zero": (entry(shape=[0, 2**39, 2**39], data_offsets=[0, 0]), "has an invalid shape"),
    "a thousand dimensions": (entry(shape=[1] * 1000), "has an invalid shape"),
    "a shape of fractions": (entry(shape=[1.5, 2]), "has an invalid shape"),
    "an unknown type": (entry(dtype="F4"), "not supported"),
    "a type that is a list": (entry(dtype=[]), "header is broken"),
    "a tensor of zero size": (entry(shape=[0, 8]), "the place of"),
    "another shape": (header(lambda e: e["model.layers.0.mlp.up_proj.weight"].update(shape=[8, 16])), "do not fit"),
    "a scalar for a bias": (bias([]), "the weight asks for"),
    "a missing tensor": (index(**{"model.norm.weight": SHARD}), "is not in"),
    "a missing shard": (lambda path: (path / SHARD).unlink(), "cannot be read"),
    "a shard that is a pipe": (fifo(SHARD), "not a file"),
    "a shard that is a folder": (lambda path: ((path / SHARD).unlink(), (path / SHARD).mkdir()), "not a file"),
    "NaN": (nan, "not finite"),
    "an index up the tree": (index(a="../../etc/passwd"), "plain file name"),
    "an absolute index": (index(a="/etc/passwd"), "plain file name"),
    "an index with NUL": (index(a="a\0.safetensors"), "plain file name"),
    "an index with a surrogate": (index(a="\ud800.safetensors"), "plain file name"),
    "an index with dots": (index(a=".."), "plain file name"),
    "an index with numbers": (index(a=1), "plain file name"),
    "an index of nothing": (lambda path: write_index(path, {}), "no weight_map"),
    "an index that is a list": (text(INDEX_NAME, b"[]"), "not a JSON object"),
    "an index nested deep": (text(INDEX_NAME, DEEP), "not readable|nested"),
    "a name twice in the index": (text(INDEX_NAME, b'{"weight_map": {"a": "b", "a": "c"}}'), "not readable"),
    "shards named like growth": (renamed_shards(GROWTH_SHARD), "needs that name"),
    "a shard with the name of the one": (renamed_shards("model.safetensors", SINGLE), "lacks one of"),
    "a shard called README.md": (renamed_shards("README.md"), "not the name of a safetensors file"),
    "a shard called growth.json": (renamed_shards("growth.json"), "not the name of a safetensors file"),
    "growth without saying so": (rename_tensor("0.mlp.", "0.mlp.grown."), "is grown already"),
    "a line end in a name": (rename_tensor("0.mlp.gate_proj.weight", "0.mlp.gate_proj.weight\n"), "lacks one of"),
    "a layer of 5,000 digits": (rename_tensor("layers.0.mlp", f"layers.{'9' * 5000}.mlp"), "in layers"),
    "a config that is a pipe": (fifo("config.json"), "not a file"),
    "a config in latin-1": (text("config.json", b'{"a": "\xe9"}'), "not readable"),
    "a config nested deep": (config(deep=json.loads("[" * 300 + "]" * 300)), "nested too deeply"),
    "growth that is text": (config(growth="yes"), "is grown already"),
    "layers that are text": (config(num_hidden_layers="two"), "speaks of two layers"),
    "a width that is a list": (config(intermediate_size=[16]), "is not a width, or one for each"),
    "a text config that is a list": (config(text_config=[1], hidden_size=9), "hidden_size 9"),
}  # fmt: skip


def in_growth(change: Callable[[dict[str, Any]], object]) -> Break:
    """Changes the growth's metadata, wherever it stands."""

    def apply(path: Path) -> None:
        for name, key in (("config.json", "growth"), ("growth.json", None)):
            facts = json.loads((path / name).read_text())
            change(facts[key] if key else facts)
            (path / name).write_text(json.dumps(facts))

    return apply


def files_named(**names: str) -> Break:
    def change(facts: dict[str, Any]) -> None:
        files = facts["base"]["files"]
        first = next(iter(files))
        files[names.get("key", first)] = files.pop(first) | ({"name": names["name"]} if "name" in names else {})

    return in_growth(change)


BROKEN_GROWTH: dict[str, tuple[Break, str]] = {
    "a base's file up the tree": (files_named(name="../escaped"), "plain file name"),
    "a base's file from up the tree": (files_named(key="../base/" + SHARD), "plain file name"),
    "text": (config(growth="yes"), "config.json"),
    "no layers": (in_growth(lambda f: f.update(layers=[])), "factor and layers"),
    "layers that are fractions": (in_growth(lambda f: f.update(layers=[0.5])), "factor and layers"),
    "infinite layers": (in_growth(lambda f: f.update(layers=[float("inf")])), "factor and layers"),
    "a billion copies": (in_growth(lambda f: f.update(factor=10**9)), "factor and layers"),
    "an infinite factor": (in_growth(lambda f: f.update(factor=float("inf"))), "factor and layers"),
    "another factor": (in_growth(lambda f: f.update(factor=3)), "the plan says"),
    "a layer fewer": (in_growth(lambda f: f.update(layers=[0])), "not in the plan"),
    "a layer more": (in_growth(lambda f: f.update(layers=[0, 1, 2])), "no mlps of layers .2. to grow"),
    "training that is text": (in_growth(lambda f: f.update(trained="yes")), "not what this program writes"),
    "training without facts": (in_growth(lambda f: f.update(trained={"method": 1})), "not what this program writes"),
    "a base without files": (in_growth(lambda f: f["base"].pop("files")), "not what this program writes"),
    "a shape": (header(lambda e: e[max(e)].update(shape=[8, 16]), GROWTH_SHARD), "the plan says"),
    "a type": (header(lambda e: e[max(e)].update(dtype="F16"), GROWTH_SHARD), "the plan says"),
}  # fmt: skip
