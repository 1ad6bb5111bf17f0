"""Checkpoints made by hand, of any size and as broken as a test needs them; no transformers, so they cost nothing."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grow.checkpoint.shards import INDEX_NAME


def tensors(layers: int = 2, hidden: int = 8, width: int = 16) -> dict[str, torch.Tensor]:
    """What a small Gemma holds that growth looks at, and an embedding."""
    generator = torch.Generator().manual_seed(layers)
    shapes = {"model.embed_tokens.weight": (32, hidden)}
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        shapes |= {f"{mlp}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{mlp}.down_proj.weight"] = (hidden, width)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_base(path: Path, layers: int = 2, hidden: int = 8, width: int = 16, shards: int = 2) -> Path:
    """A base in some shards with an index, a tokenizer and a card."""
    path.mkdir(parents=True)
    held = tensors(layers, hidden, width)
    names, weight_map = list(held), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: held[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(path, weight_map)
    config = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": width}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (path / "README.md").write_text("---\nlicense: gemma\n---\nA base.\n")
    return path


def write_index(path: Path, weight_map: Mapping[str, Any]) -> None:
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def split_file(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and its data."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(file: Path, header: Any, data: bytes) -> None:
    """Writes one, whatever the header is; an own copy, should the file be a link."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.unlink(missing_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def reseal(grown: Path) -> None:
    """Makes growth.json's checksums of small files right again, as one does who means harm."""
    facts = json.loads((grown / "growth.json").read_text())
    facts.pop("sha256", None)
    if isinstance(facts.get("small_files"), dict):
        present = [name for name in facts["small_files"] if len(name) < 99 and (grown / name).is_file()]
        facts["small_files"] |= {name: hashlib.sha256((grown / name).read_bytes()).hexdigest() for name in present}
    facts["sha256"] = hashlib.sha256((json.dumps(facts, indent=2) + "\n").encode()).hexdigest()
    (grown / "growth.json").write_text(json.dumps(facts, indent=2) + "\n")
