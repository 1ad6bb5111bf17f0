"""G-Freeze: only the added copies train; everything that was there before stays as it is."""

from typing import Any

GROWS = True


def prepare(model: Any) -> None:
    """Freezes all but the added copies of the grown layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.grown." in name)
