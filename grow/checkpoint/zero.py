"""DeepSpeed checkpoints, read lazily: the fp32 master weights of what trained, some rows at a time.

The layouts are those of DeepSpeed 0.19 (its utils/zero_to_fp32.py and checkpoint/ds_to_universal.py describe them):
- ZeRO-1 and 2: a parameter group is one long vector, cut evenly over the ranks' `*_optim_states.pt`;
- ZeRO-3: every parameter is cut evenly over the ranks, and a rank's parts follow on;
- ZeRO-0: whole parameters in `*_model_states.pt`, in the model's dtype, since it has no master weights;
- universal: a folder for each parameter, `zero/<name>/fp32.pt`.
Names and shapes, and what was frozen, stand in rank 0's `*_model_states.pt`.
"""

import re
from math import ceil, prod
from pathlib import Path
from typing import Any

from grow.checkpoint import lazy
from grow.checkpoint.dtypes import Rows
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.shards import identity
from grow.errors import UserError

Shapes = dict[str, tuple[int, ...]]


class _Opaque:
    """Stands in for DeepSpeed's own classes, whose values are not needed."""

    def __init__(self, *_: Any):
        pass


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


def _stage(_: Any, name: str) -> int:
    """Returns a member of ZeroStageEnum by name. Python 3.11.0 to 3.11.3 pickle a member as getattr(its class, its
    name)."""
    return _STAGES[name]


# What these pickles may ask for beyond tensors. Anything else is refused by torch's weights_only loader.
_ALLOWED: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_stage, "builtins.getattr"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    import torch

    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds; each means that the file is not what it should be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a sound DeepSpeed checkpoint file ({reason[:200]})") from error


class ZeroCheckpoint:
    """Reads the parameters in a folder that DeepSpeed's save_checkpoint wrote: the one with `latest` in it, or one
    tag's.

    `trained` and `frozen` map the model's parameter names to their values: trained ones are master weights, fp32;
    frozen ones are there only if the checkpoint was not made with exclude_frozen_parameters. `path` is the tag's
    folder. Raises UserError if ranks' files are missing or unsound.
    """

    def __init__(self, path: Path, tag: str = ""):
        self.path = folder = _tag_folder(path, tag)
        self.trained: dict[str, LazyTensor] = {}
        self.frozen: dict[str, LazyTensor] = {}
        self.stage, self.world_size = 0, 1
        model_files = sorted(folder.glob("*_model_states.pt"), key=_rank)
        optimizer_files = sorted(folder.glob("*_optim_states.pt"), key=_rank)
        try:
            if (folder / "zero").is_dir():
                self._read_universal()
            elif not model_files:
                raise UserError(f"{folder}: no *_model_states.pt in it; is it a DeepSpeed checkpoint?")
            elif optimizer_files:
                self._read_zero(model_files, optimizer_files)
            else:
                self._read_whole(_load(model_files[0]))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f"{folder}: not laid out as DeepSpeed 0.19 does it ({error!r})") from error
        if not self.trained:
            raise UserError(f"{folder}: no trained parameter in it")

    def identity(self) -> list[Any]:
        """Returns what tells the files from others."""
        return identity(sorted(self.path.rglob("*.pt")))

    def _read_universal(self) -> None:
        for file in sorted((self.path / "zero").glob("*/fp32.pt")):
            state = _load(file)
            self.trained[file.parent.name] = lazy.from_tensor(state["param"] if isinstance(state, dict) else state)

    def _read_whole(self, state: dict[str, Any]) -> None:
        """Reads ZeRO-0's files: the module's own state, which does not list what was frozen, so everything counts as
        trained.

        Tied tensors share their storage: the second name is left out, and so are buffers.
        """
        seen: set[int] = set()
        for name, value in state["module"].items():
            if value.data_ptr() not in seen and name not in (state.get("buffer_names") or ()):
                self.trained[name] = lazy.from_tensor(value)
                seen.add(value.data_ptr())

    def _read_zero(self, model_files: list[Path], optimizer_files: list[Path]) -> None:
        states = [_load(file)["optimizer_state_dict"] for file in optimizer_files]
        model = _load(model_files[0])
        self.stage = int(states[0]["zero_stage"])
        count = states[0]["partition_count"]
        self.world_size = max(count) if isinstance(count, list) else int(count)
        if self.world_size != len(states):
            raise UserError(f"{self.path}: {len(states)} of {self.world_size} ranks' files are there")
        groups = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        if self.stage == 3:
            flat = [state["fp32_flat_groups"] for state in states]
            shapes = {name: shape for group in groups for name, shape in group.items()}
            self.trained = self._cut_by_parameter(shapes, flat)
            if model.get("frozen_param_fragments"):
                if len(model_files) != self.world_size:
                    raise UserError(f"{self.path}: {len(model_files)} of {self.world_size} ranks' files are there")
                ranks = [_load(file)["frozen_param_fragments"] for file in model_files]
                for name, shape in model["frozen_param_shapes"].items():
                    self.frozen[name] = _joined([rank[name].view(-1) for rank in ranks], tuple(shape), name)
        else:
            flat = [state["single_partition_of_fp32_groups"] for state in states]
            self.trained = self._cut_by_group(groups, flat, states[0].get("param_alignment_paddings"))
            fragments = model.get("frozen_param_fragments") or {}
            self.frozen = {name: lazy.from_tensor(value) for name, value in fragments.items()}

    def _cut_by_group(self, groups: list[Shapes], flat: Any, paddings: Any) -> dict[str, LazyTensor]:
        found = {}
        for group, shapes in enumerate(groups):
            offset = 0
            parts = [rank[group] for rank in flat]
            for index, (name, shape) in enumerate(shapes.items()):
                found[name] = _joined(_range(parts, offset, prod(shape)), shape, name)
                offset += prod(shape) + (paddings[group][index] if paddings else 0)
        return found

    def _cut_by_parameter(self, shapes: Shapes, flat: Any) -> dict[str, LazyTensor]:
        found, offset = {}, 0
        for name, shape in shapes.items():
            length = ceil(prod(shape) / self.world_size)
            parts = [part for rank in flat for part in _range(rank, offset, length)]
            found[name] = _joined(parts, shape, name)
            offset += length
        return found


def _tag_folder(path: Path, tag: str) -> Path:
    if tag:
        folder = path / tag
        if Path(tag).name != tag or tag == ".." or not folder.is_dir():
            tags = sorted(child.name for child in path.iterdir() if any(child.glob("*_states.pt")))
            raise UserError(f"{path}: no tag {tag} in it; there are: {', '.join(tags) or 'none'}")
        return folder
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            return _tag_folder(path, (path / name).read_text(errors="replace").strip() or "(none)")
    if any(path.glob("*_states.pt")) or (path / "zero").is_dir():
        return path
    raise UserError(f"{path}: no DeepSpeed checkpoint there (no file `latest`)")


def is_deepspeed(path: Path) -> bool:
    """Says whether a folder looks like a DeepSpeed checkpoint, or like one tag of it."""
    return any((path / name).exists() for name in ("latest", "latest_universal", "zero")) or any(
        path.glob("*_model_states.pt")
    )


def _range(vectors: list[Any], offset: int, length: int) -> list[Any]:
    """Returns [offset, offset + length) of vectors that stand one after the other."""
    found, start = [], 0
    for vector in vectors:
        begin, end = max(offset - start, 0), min(offset + length - start, len(vector))
        if begin < end:
            found.append(vector[begin:end])
        start += len(vector)
    return found


def _joined(parts: list[Any], shape: tuple[int, ...], name: str) -> LazyTensor:
    """Returns a parameter of this shape whose values are the parts, one after the other; what is over is padding."""
    if any(part.dim() != 1 or part.device.type != "cpu" or str(part.layout) != "torch.strided" for part in parts):
        raise ValueError(f"{name} is not cut from vectors")
    if not parts or min(shape, default=0) < 0 or sum(len(part) for part in parts) < prod(shape):
        raise UserError(f"{name}: the DeepSpeed checkpoint is shorter than the parameters it lists")
    pieces, width = [lazy.from_tensor(part) for part in parts], prod(shape[1:])
    values = lazy.concat_rows(*pieces)

    def rows(begin: int, end: int) -> Rows:
        return values.rows(begin * width, end * width).reshape(end - begin, *shape[1:])

    return LazyTensor(shape, values.dtype, rows)


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0
