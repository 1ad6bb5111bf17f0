"""Checkpoints of the true shapes of Gemma 3 1B and 4B with random weights, and ZeRO-3 shards of the 1B's size."""

from collections import OrderedDict
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from grow.checkpoint.dtypes import Rows, convert
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.output import OutputFolder, no_progress
from grow.checkpoint.writer import split_into_shards
from tests.helpers.tiny import make_tokenizer

CONFIGS = {
    "1B": transformers.Gemma3TextConfig(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, vocab_size=262144,
    ),
    "4B": transformers.Gemma3Config(
        text_config={
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        },
        vision_config={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14,
        },
    ),
}  # fmt: skip


@cache
def pool(dtype: str) -> Rows:
    """Random values, once for all tensors of a dtype."""
    return convert(np.random.default_rng(0).standard_normal(2**24, dtype=np.float32) * np.float32(0.02), "F32", dtype)


def noise(shape: tuple[int, ...], dtype: str, seed: int) -> LazyTensor:
    """Values that look random, at the speed of copying: windows of one pool."""
    width = prod(shape[1:])

    def rows(begin: int, end: int) -> Rows:
        count, start = (end - begin) * width, (seed * 7919 + begin * 104729) % 2**20
        return np.resize(pool(dtype)[start:], count).reshape(end - begin, *shape[1:])

    return LazyTensor(shape, dtype, rows)


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names (the hub's) and shapes of a model's tensors."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(CONFIGS[size]) if size == "4B" else (
            transformers.AutoModelForCausalLM.from_config(CONFIGS[size])
        )  # fmt: skip
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if size == "4B":
        found = {
            name.removeprefix("model.").replace("language_model.", "language_model.model.", 1): shape
            for name, shape in found.items()
        }
    return found


def make_base(path: Path, size: str) -> Path:
    """A base of a size, in bf16: one file for the 1B, two shards for the 4B."""
    tensors = {name: noise(shape, "BF16", i) for i, (name, shape) in enumerate(shapes(size).items())}
    shards = split_into_shards(tensors, 5 * 10**9, "model")
    if len(shards) == 1:
        shards = {"model.safetensors": tensors}
    config = CONFIGS[size].to_dict() | {"dtype": "bfloat16"}
    config["architectures"] = ["Gemma3ForConditionalGeneration" if size == "4B" else "Gemma3ForCausalLM"]
    with OutputFolder(path, {"bench": size}) as folder:
        folder.write_shards(shards, no_progress)
        if len(shards) > 1:
            files = {name: file for file, part in shards.items() for name in part}
            folder.write_index(files, {name: tensor.nbytes for name, tensor in tensors.items()})
        folder.write_json("config.json", config)
    make_tokenizer(path)
    return path


def write_zero3(like: Path, out: Path, values: dict[str, LazyTensor], world_size: int) -> None:
    """ZeRO-3 shards of any parameters, with all else as in a real checkpoint (a tag's folder of as many ranks).

    Adam's moments are left out: no converter reads them.
    """
    out.mkdir(parents=True)
    for rank in range(world_size):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        model: dict[str, Any] = torch.load(like / name, weights_only=False)
        model["param_shapes"] = [OrderedDict((n, torch.Size(value.shape)) for n, value in values.items())]
        model["module"], model["frozen_param_shapes"], model["frozen_param_fragments"] = {}, None, None
        model["shared_params"] = {}
        torch.save(model, out / name)
        (file,) = like.glob(f"*zero_pp_rank_{rank}_*_optim_states.pt")
        optimizer: dict[str, Any] = torch.load(file, weights_only=False)
        parts = []
        for value in values.values():
            length = ceil(value.numel / world_size)
            # A copy, so that the whole tensor does not stay in memory behind it.
            part = value.load().view(-1)[rank * length : (rank + 1) * length].clone()
            parts.append(torch.nn.functional.pad(part, (0, length - len(part))))
        optimizer["optimizer_state_dict"]["fp32_flat_groups"] = [torch.cat(parts)]
        optimizer["optimizer_state_dict"].pop("optimizer_state_dict", None)
        torch.save(optimizer, out / file.name)
    (out.parent / "latest").write_text(out.name)
