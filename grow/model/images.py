"""Batches with images and without, side by side on the ranks of a run.

DeepSpeed has all ranks gather a module's parameters (ZeRO-3) and reduce its gradients together. A rank whose batch has
no image would not pass through the tower, and the others would wait for it for ever. So such a batch passes a blank
image through tower and projector, at the place where the model's code would; what comes out is added times zero.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grow.data.packing import OF_TOKENS
from grow.errors import UserError
from grow.names import of_language_model
from grow.recipe import AUTO, Recipe


def of_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a model is given of a batch's images."""
    return {name: tensor for name, tensor in batch.items() if name not in OF_TOKENS}


@contextlib.contextmanager
def passing_the_tower(model: Any, batch: dict[str, Tensor]) -> Iterator[None]:
    """Lets a batch without images pass through a model's tower within the context, if the model's `blank_image` has the
    tensors of one (blank_for) and other ranks may wait for it."""
    blank = model.__dict__.get("blank_image")
    if not blank or of_images(batch) or not ((model.training and torch.is_grad_enabled()) or _partitioned(model)):
        yield
        return

    def add_nothing(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embedded = kwargs["inputs_embeds"]
        parts = image_features(model, {name: tensor.to(embedded.device) for name, tensor in blank.items()})
        nothing = 0 * torch.stack([part.sum() for part in parts]).sum()
        return args, kwargs | {"inputs_embeds": embedded + nothing.to(embedded.dtype)}

    # Where the model's code has it, or ranks would gather parameters in different orders and wait for ever: after all
    # embeddings, of which Gemma 4 has some for each layer, and before DeepSpeed's own hook of the decoder.
    handle = model.get_decoder().register_forward_pre_hook(add_nothing, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def image_features(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Returns what a model's tower and projector make of images, which the language model is given for them."""
    made = model.get_image_features(**inputs)
    features = getattr(made, "pooler_output", made)
    return list(features) if isinstance(features, (list, tuple)) else [features]


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns the height and the width that a tower's config means: a number is both, InternVL has them apart."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_images(recipe: Recipe, tower: bool, config: Any) -> None:
    """Raises UserError where rows with images and the rest of a recipe do not go together, for a model with this
    config; `tower` says that something of its tower or projector trains."""
    if tower and not recipe.images:
        raise UserError(
            "tower, train_projector: text alone gives them no gradient; name the column of the rows' images (images: "
            "COLUMN)"
        )
    if not recipe.images:
        return
    if recipe.switch:
        raise UserError("images: a switch decides by text alone; take switch out")
    if recipe.attn_implementation.startswith("flash"):
        raise UserError(
            f"images: tokens of one image see each other, which attn_implementation {recipe.attn_implementation} "
            "cannot; take auto"
        )
    if recipe.per_device_train_batch_size == AUTO:
        raise UserError("images: per_device_train_batch_size auto tries sequences of text alone; give a number")
    if "mrope_section" in str(config.get_text_config().to_dict()):
        raise UserError(
            f"images: {config.model_type} counts positions along images in its own way, which is not known here; rows "
            "of text alone work"
        )


def blank_for(model: nn.Module, blank: dict[str, Tensor]) -> None:
    """Gives a model a blank image, if something of its tower or projector trains or ZeRO-3 partitions it."""
    beside = [parameter for name, parameter in model.named_parameters() if not of_language_model(name)]
    if _partitioned(model) or any(parameter.requires_grad for parameter in beside):
        model.__dict__["blank_image"] = blank


def _partitioned(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
