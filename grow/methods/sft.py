"""Plain fine-tuning: every parameter of the language model trains. The rival that forgets."""

from typing import Any

GROWS = False


def prepare(model: Any) -> None:
    """Trains everything but a vision tower and its projector, which text has no gradient for."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower." not in name and "multi_modal_projector." not in name)
