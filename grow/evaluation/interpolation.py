"""A model interpolated with its base: α = 0 is the base, exactly, 1 the trained model.

A grown or adapted checkpoint has its base inside. A stock one needs the base that it was trained from; its weights are
then interpolated with the base's, as `consolidate --alpha` does it, so that both are loaded once for a whole curve.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.hub import locate
from grow.checkpoint.metadata import GROWTH_NAME
from grow.checkpoint.shards import Checkpoint, read_json
from grow.errors import UserError
from grow.model.alpha import has_base_inside, set_alpha
from grow.model.bottleneck import CONFIG
from grow.model.loading import LORA_CONFIG, compute_device, compute_dtype, is_lora, load
from grow.model.lora import check_scales, not_scaled
from grow.model.loss import base_logits
from grow.model.memory import tune_malloc
from grow.model.switched import set_switch
from grow.names import canonical
from grow.plan import text_config


def check_alphas(path: str, start: str, alphas: Iterable[float]) -> None:
    """Raises UserError, before anything is loaded, for an invalid α, and for any α but 1 where there is no base.

    There is none if the checkpoint has no base inside and no `start` is given. A `start` of other shapes, as a grown
    model that was made stock has it, is a base to compare with, at α = 1 alone; one of another vocabulary is refused.
    """
    folder = locate(path)
    if (folder / "run.json").is_file():
        raise UserError(f"{path}: is a run; score what it is consolidated to (launch/consolidate.sh RECIPE)")
    refuse_package(folder)
    alphas, inside = tuple(alphas), holds_base(folder)
    if start and inside:
        raise UserError(f"--start {start}: {path} has its base inside")
    if start and (_vocabulary(path) != _vocabulary(start)):
        raise UserError(f"--start {start}: its vocabulary is another than that of {path}")
    if start and set(alphas) != {1} and _shapes(path) != _shapes(start):
        raise UserError(f"{path} and {start} are of different shapes, so there is nothing between them: --alpha 1")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise UserError(f"--alpha {alpha:g}: it lies between 0 (the base) and 1 (as trained)")
        if is_lora(folder):
            check_scales(_adapter(folder), alpha)
        if alpha != 1 and not (inside or start):
            raise UserError(f"{path}: no base is inside; name what it was trained from: --start BASE")


def refuse_package(folder: Path) -> None:
    """Raises UserError for a growth package, which is no model by itself."""
    if (folder / GROWTH_NAME).is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: a growth package; put it on its base: grow attach BASE {folder} OUT")


def holds_base(folder: Path) -> bool:
    """Says whether a checkpoint's folder holds, or names, the base beside what was trained."""
    if is_lora(folder):
        return not _adapter(folder)
    return (folder / CONFIG).is_file() or "growth" in read_json(folder / "config.json")


def _adapter(folder: Path) -> str:
    return not_scaled(read_json(folder / LORA_CONFIG))


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    tensors = Checkpoint(path).tensors
    return {canonical(name): info.shape for name, info in tensors.items() if not name.endswith("lm_head.weight")}


def _vocabulary(path: str) -> int:
    return int(text_config(Checkpoint(path).config)["vocab_size"])


class Interpolation:
    """Holds a model at an interpolation coefficient, which is 1 at first.

    `model` is on the GPU if there is one, in the dtype that this machine computes in. The arguments must have passed
    check_alphas. Raises UserError for a `switch` other than "auto" where the model has none.
    """

    def __init__(self, path: str, start: str = "", switch: str = "auto"):
        tune_malloc()
        device = compute_device()
        self.model: Any = load(path, compute_dtype()).to(device)
        if switch != "auto":
            set_switch(self.model, switch)
        self.alpha = 1.0
        self._base: Any = None
        if start:
            self._base = load(start, compute_dtype()).to(device)
            own, before = (dict(model.named_parameters()) for model in (self.model, self._base))
            if {name: p.shape for name, p in own.items()} == {name: p.shape for name, p in before.items()}:
                self._trained = [
                    (p.data, p.data.clone(), before[name].data)
                    for name, p in own.items()
                    if not torch.equal(p, before[name])
                ]

    def set(self, alpha: float) -> None:
        """Sets the interpolation coefficient."""
        if self._base is None:
            set_alpha(self.model, alpha)
        elif alpha != self.alpha:
            for now, trained, before in self._trained:
                between = trained if alpha else before
                if 0 < alpha < 1:
                    between = before.float() + alpha * (trained.float() - before.float())
                now.copy_(between)
        self.alpha = alpha

    @property
    def has_base(self) -> bool:
        """Says whether the base is known: inside the model, or as `start`."""
        return self._base is not None or has_base_inside(self.model)

    def base_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the base's logits where there is a label, as grow.model.loss.labelled_logits does; α stays."""
        return base_logits(self.model, batch, self._base)
