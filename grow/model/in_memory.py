"""Reads a loaded model as if it were a checkpoint's files: tensors by name, a block of rows at a time."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grow.checkpoint.dtypes import TORCH_NAMES, itemsize
from grow.checkpoint.lazy import LazyTensor, from_tensor
from grow.checkpoint.shards import Checkpoint, TensorInfo
from grow.errors import UserError
from grow.model.gather import gathered
from grow.names import canonical

_NAMES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}


class InMemoryCheckpoint(Checkpoint):
    """Presents a model in memory as a checkpoint; `model` is a PreTrainedModel.

    Tied tensors are there under one name. `path` says where the model was loaded from, for messages.
    """

    def __init__(self, model: Any):
        if any(hasattr(parameter, "ds_id") and not parameter.numel() for parameter in model.parameters()):
            raise UserError(
                f"{type(model).__name__}: its weights are in partitions (ZeRO-3); on all ranks call this within "
                "deepspeed.zero.GatheredParameters(list(model.parameters())), and write on one"
            )
        if any(hasattr(module, "lora_A") for module in model.modules()):
            raise UserError(f"{type(model).__name__}: has LoRAs in it; put them into the weights: merge_and_unload()")
        self.path = Path(getattr(model, "name_or_path", "") or type(model).__name__)
        self.shards: list[Path] = []
        self.config: dict[str, Any] = model.config.to_dict()
        self._tensors = _untied(model)
        self.tensors = {name: _info(self.path, name, tensor) for name, tensor in self._tensors.items()}

    def lazy(self, name: str) -> LazyTensor:
        """Returns the tensor, to be read by rows, from any device."""
        return from_tensor(self._tensors[name].cpu())

    def files(self) -> Checkpoint | None:
        """Returns the checkpoint that the model was loaded from; None if it is not here."""
        try:
            return Checkpoint(self.path)
        except UserError:
            return None


def _untied(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            found[name] = tensor
    return found


def _info(path: Path, name: str, tensor: Tensor) -> TensorInfo:
    dtype = _NAMES.get(str(tensor.dtype))
    if dtype is None or tensor.device.type == "meta":
        raise UserError(f"{path}: {name} is {tensor.dtype} on {tensor.device}; load the model whole, and not quantized")
    shape = tuple(tensor.shape)
    return TensorInfo(path, dtype, shape, 0, prod(shape) * itemsize(dtype))


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, LazyTensor]) -> None:
    """Copies tensors to the parameters of the same canonical names."""
    parameters = {canonical(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        if name.endswith("lm_head.weight") and canonical(name) not in parameters:
            continue  # tied: the embeddings' second name
        parameter = parameters[canonical(name)]
        with gathered(parameter):
            parameter.copy_(tensor.load())
