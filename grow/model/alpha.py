"""The interpolation coefficient α of a model in memory: 0 is its base, exactly, 1 the trained model.

A value between gives what WiSE-FT (arXiv 2109.01903) gets by averaging weights, without a second set of them.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

from grow.errors import UserError
from grow.model.grown import parts_with_alpha
from grow.model.lora import has_scaled_loras, scale_loras, scalings_kept


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Sets the interpolation coefficient of a grown or adapted model: 0 is its base, exactly, 1 as trained.

    If the checkpoint gives each layer, or each of several skills, a coefficient, 1 means these. LoRAs that are not
    merged have it too (grow.model.lora.scale_loras). Other models are left as they are. Raises UserError for a value
    outside of [0, 1], and below 1 for an adapter of PEFT's that has none.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha}: it lies between 0 (the base) and 1 (as trained)")
    scale_loras(model, alpha)
    for part in parts_with_alpha(model):
        part.alpha = alpha * part.own_alpha


def has_base_inside(model: nn.Module) -> bool:
    """Says whether `base_inside` finds a base in a model."""
    return any(True for _ in parts_with_alpha(model)) or has_scaled_loras(model)


@contextlib.contextmanager
def base_inside(model: nn.Module) -> Iterator[None]:
    """Turns a grown or adapted model, or one with LoRAs, into its base within the context; afterwards each α is
    restored. Raises UserError as `set_alpha` does."""
    alphas = {part: part.alpha for part in parts_with_alpha(model)}
    with scalings_kept(model):
        try:
            set_alpha(model, 0)
            yield
        finally:
            for part, alpha in alphas.items():
                part.alpha = alpha
