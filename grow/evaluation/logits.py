"""Compares two checkpoints bit for bit: runs both on the same tokens and compares every logit."""

import inspect
from typing import Any

import torch
from torch import Tensor

from grow.data.tokenizer import load_tokenizer
from grow.model.grown import grown_beside_text
from grow.model.images import image_features, sides
from grow.model.loading import load
from grow.model.switched import SwitchedModel, set_switch

# Any text will do; this one is long enough for 200 tokens in any tokenizer.
TEXT = (
    "A language model that is fine-tuned on something narrow forgets much of what it knew, because the weights that "
    "held the old knowledge are the ones that are overwritten. A model that grows instead keeps them. At first its new "
    "neurons are copies of the old ones, and each contributes a half of what one contributed before, so that nothing "
    "at all has changed; then only the copies learn. En un mot : apprendre sans oublier. Die Hauptstadt von Frankreich "
    "ist Paris, 12 * 12 = 144, and `def add(a, b): return a + b` is a function. The seven colours of the rainbow are "
    "red, orange, yellow, green, blue, indigo and violet; water boils at 100 degrees Celsius at sea level; and the "
    "first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19, 23 and 29. Many small steps lead further than one leap."
)


@torch.no_grad()
def compare_logits(path: str, base_path: str, device: str = "cpu", alpha: float = 1.0) -> dict[str, dict[str, Any]]:
    """Compares two checkpoints' logits, or what a class without a head gives, on one text, in fp32 and in bf16:
    {"float32": {"difference": 0.0, …}, …}; and where something of the tower for images has grown what both make of one,
    "float32, of an image", or why not: {"left_out": "its class asks for image_sizes"}.

    `difference` is the largest, 0.0 if and only if all are equal bit for bit (torch.equal); `largest` is the largest
    logit of the second checkpoint, for comparison. `alpha` is the first one's.
    """
    tokenizer = load_tokenizer(base_path)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids.to(device)
    found: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        models: list[Any] = [load(path, dtype, alpha).to(device), load(base_path, dtype).to(device)]
        if isinstance(models[0], SwitchedModel):  # it is the growth that is compared
            set_switch(models[0], "on")
        name = str(dtype).removeprefix("torch.")
        places = getattr(models[1].config.get_text_config(), "max_position_embeddings", None)
        found[name] = _compared([model(input_ids=ids[:, :places], use_cache=False)[0] for model in models])
        if grown_beside_text(models[0]):
            asked = _asks_for(models[0])
            of_image = {"left_out": f"its class asks for {asked}"} if asked else None
            found[f"{name}, of an image"] = of_image or _compared([_of_an_image(model) for model in models])
    return found


def _compared(results: list[Tensor]) -> dict[str, float]:
    one, other = results
    difference = 0.0 if torch.equal(one, other) else float((one - other).abs().max())
    return {"difference": difference, "largest": float(other.abs().max())}


def _asks_for(model: Any) -> str:
    """Returns what a model's tower asks for, beside pixels, that is not known here; "" for nothing."""
    known = ("pixel_values", "image_position_ids", *["image_sizes"] * _is_pixtral(model))
    parameters = inspect.signature(model.get_image_features).parameters.values()
    asked = (one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD)
    return ", ".join(name for name in asked if name not in known)


def _is_pixtral(model: Any) -> bool:
    """Says whether a model's tower takes images of any size, with their sizes."""
    return str(model.config.vision_config.model_type) == "pixtral"


def _of_an_image(model: Any) -> Tensor:
    """Returns what a model's tower and projector make of noise."""
    config, generator = model.config.vision_config, torch.Generator().manual_seed(0)
    size, inputs = getattr(config, "image_size", None), dict[str, Tensor]()
    if size is None:  # Gemma 4's takes patches and where they are: here 4 tokens, each made of a square of patches
        along = torch.arange(2 * config.pooling_kernel_size)
        inputs["image_position_ids"] = torch.cartesian_prod(along, along)[None].to(model.device)
        shape: tuple[int, ...] = (1, len(along) ** 2, 3 * config.patch_size**2)
    else:
        shape = (1, 3, *sides(size))
        if _is_pixtral(model):
            inputs["image_sizes"] = torch.tensor([sides(size)])
    inputs["pixel_values"] = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    return torch.cat(image_features(model, inputs))
