"""The interpolation coefficient α of a model in memory: 0 is its base, exactly, 1 the trained model.

A value between gives what WiSE-FT (arXiv 2109.01903) gets by averaging weights, without a second set of them.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

from grow.errors import UserError
from grow.model.grown import parts_with_alpha


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Sets the interpolation coefficient of a grown or adapted model: 0 is its base, exactly, 1 as trained.

    If the checkpoint gives each layer, or each of several skills, a coefficient, 1 means these. Other models are left
    as they are. Raises UserError for a value outside of [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha}: it lies between 0 (the base) and 1 (as trained)")
    for mlp in parts_with_alpha(model):
        mlp.alpha = alpha * mlp.own_alpha


def has_base_inside(model: nn.Module) -> bool:
    """Says whether `base_inside` finds a base in a model."""
    return any(True for _ in parts_with_alpha(model)) or _has_loras(model)


def _has_loras(model: nn.Module) -> bool:
    return any(hasattr(module, "lora_A") for module in model.modules())


@contextlib.contextmanager
def base_inside(model: nn.Module) -> Iterator[None]:
    """Turns a grown or adapted model, or one with LoRAs, into its base within the context; afterwards each α is
    restored."""
    before = {part: part.alpha for part in parts_with_alpha(model)}
    set_alpha(model, 0)
    try:
        with _loras_at_zero(model):
            yield
    finally:
        for part, alpha in before.items():
            part.alpha = alpha


def _loras_at_zero(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    if not _has_loras(model):
        return contextlib.nullcontext()
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(model, 0)
