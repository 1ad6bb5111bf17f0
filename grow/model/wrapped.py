"""What wraps a model: torch.compile, DDP, FSDP, DeepSpeed, PEFT."""

from typing import Any

from transformers import PreTrainedModel


def unwrapped(model: Any) -> Any:
    """Returns the model itself, within whatever wraps it."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None:
            break
        model = inner
    return model
