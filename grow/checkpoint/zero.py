"""DeepSpeed ZeRO checkpoints, read lazily: the fp32 master weights of what trained, one tensor at a time.

Each rank's `*_optim_states.pt` holds a part of them, flattened; rank 0's `*_model_states.pt` has names and shapes. The
layout is that of DeepSpeed 0.19 (deepspeed/utils/zero_to_fp32.py describes it): in ZeRO-1 and 2 a parameter group is
one long vector cut evenly over the ranks; in ZeRO-3 every parameter is cut evenly, and a rank's parts follow on.
"""

import re
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.errors import UserError


class _Opaque:
    """Stands in for DeepSpeed's own classes, whose values are not needed."""

    def __init__(self, *_: Any):
        pass


# What these pickles may ask for beyond tensors. Anything else is refused by torch's weights_only loader.
_ALLOWED: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds; each means that the file is not what it should be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a sound DeepSpeed checkpoint file ({reason[:200]})") from error


class ZeroCheckpoint:
    """The trained parameters in a folder that DeepSpeed's save_checkpoint wrote (with a `latest` file in it).

    `shapes` maps the model's parameter names to their shapes. Raises UserError if ranks' files are missing or unsound.
    """

    def __init__(self, path: Path):
        latest = path / "latest"
        if not latest.is_file():
            raise UserError(f"{path}: no DeepSpeed checkpoint there (no file `latest`)")
        folder = path / latest.read_text().strip()
        optimizer_files = sorted(folder.glob("*_optim_states.pt"), key=_rank)
        model_files = sorted(folder.glob("*_model_states.pt"), key=_rank)
        if not optimizer_files or not model_files:
            raise UserError(f"{folder}: DeepSpeed's files are not in it; ZeRO stages 1, 2 and 3 can be read")
        states = [_load(file)["optimizer_state_dict"] for file in optimizer_files]
        self.stage = int(states[0]["zero_stage"])
        count = states[0]["partition_count"]
        self.world_size = max(count) if isinstance(count, list) else int(count)
        if self.world_size != len(states):
            raise UserError(f"{folder}: {len(states)} of {self.world_size} ranks' files are there")
        self._groups: list[dict[str, tuple[int, ...]]] = [
            {name: tuple(shape) for name, shape in group.items()} for group in _load(model_files[0])["param_shapes"]
        ]
        self.shapes = {name: shape for group in self._groups for name, shape in group.items()}
        if self.stage == 3:
            self._flat = [state["fp32_flat_groups"] for state in states]
        else:
            self._flat = [state["single_partition_of_fp32_groups"] for state in states]
        self._places = self._zero3_places() if self.stage == 3 else self._zero2_places(states[0])

    def read(self, name: str) -> Tensor:
        """The master weight of one parameter, fp32, in its shape."""
        parts = [self._flat[rank][group][begin:end].detach() for rank, group, begin, end in self._places[name]]
        return torch.cat(parts)[: prod(self.shapes[name])].view(self.shapes[name])

    def _zero2_places(self, state: dict[str, Any]) -> dict[str, list[tuple[int, int, int, int]]]:
        paddings = state.get("param_alignment_paddings")
        places = {}
        for group, shapes in enumerate(self._groups):
            offset = 0
            for index, (name, shape) in enumerate(shapes.items()):
                lengths = [len(rank[group]) for rank in self._flat]
                places[name] = [(rank, group, begin, end) for rank, begin, end in _cut(lengths, offset, prod(shape))]
                offset += prod(shape) + (paddings[group][index] if paddings else 0)
        return places

    def _zero3_places(self) -> dict[str, list[tuple[int, int, int, int]]]:
        places, offset = {}, 0
        for name, shape in self.shapes.items():
            length = ceil(prod(shape) / self.world_size)
            places[name] = [
                (rank, group, begin, end)
                for rank, flat in enumerate(self._flat)
                for group, begin, end in _cut([len(part) for part in flat], offset, length)
            ]
            offset += length
        return places


def _cut(lengths: list[int], offset: int, length: int) -> list[tuple[int, int, int]]:
    """Where [offset, offset + length) lies in vectors that stand one after the other: (which, begin, end)."""
    found, start = [], 0
    for which, size in enumerate(lengths):
        begin, end = max(offset - start, 0), min(offset + length - start, size)
        if begin < end:
            found.append((which, begin, end))
        start += size
    if sum(end - begin for _, begin, end in found) != length:
        raise UserError("the DeepSpeed checkpoint is shorter than the parameters it lists")
    return found


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0
