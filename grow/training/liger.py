"""`use_liger_kernel`: Liger's fused kernels ([arXiv 2410.10989](https://arxiv.org/abs/2410.10989)) for norms, rotary
positions and the products of gated MLPs, an extra that is not required: `pip install liger-kernel`.

transformers and Liger put norms and rotary positions into a model. The MLP's part is put into the class of the base's
MLP here, because all branches of a grown MLP compute by its code: so a grown model still starts on the bits of its base
where both use the kernels. Classes change for the whole process.
"""

import importlib
import importlib.util
import inspect
import os
from typing import Any

import torch
from transformers.integrations.liger import apply_liger_kernel

from grow.errors import UserError
from grow.model.layouts import decoder_mlps, layout_of, stock_class
from grow.names import FUSED
from grow.recipe import AUTO, Recipe
from grow.training.compiling import compiles

# Liger's MLPs, by what it calls their product, and by their number of matrices: in two, gate and up are one.
_MLPS = {("geglu", 3): "LigerGEGLUMLP", ("swiglu", 3): "LigerSwiGLUMLP", ("swiglu", 2): "LigerPhi3SwiGLUMLP"}
_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", "silu": "swiglu"}
_OTHERS = ("geglu", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
"""What Liger is not to put in: MLPs are put in here, and grow.model.head computes the loss."""


def check_liger(recipe: Recipe) -> None:
    """Raises UserError where a recipe asks for the kernels and for what they do not go with."""
    if recipe.use_liger_kernel == "true" and recipe.compile == "true":
        raise UserError("use_liger_kernel true: compile fuses the same operations; take one of them out")


def check_kernels(recipe: Recipe, model_type: str) -> None:
    """Raises UserError if the kernels that a recipe asks for are not on this machine, or not for such a model."""
    if recipe.use_liger_kernel != "true":
        return
    if not _is_installed():
        raise UserError("use_liger_kernel true: is not installed; pip install liger-kernel, or take it out")
    if not _runs_here():
        raise UserError("use_liger_kernel true: its kernels need a GPU; auto takes them where there is one")
    if not _kernels_of(model_type):
        raise UserError(f"use_liger_kernel true: Liger has no kernels for {model_type}; auto takes them where it has")


def uses_liger(recipe: Recipe, model_type: str) -> bool:
    """Says whether a run uses the kernels: "auto" does on GPUs where they are installed, if layers are not compiled."""
    if recipe.use_liger_kernel != AUTO:
        return recipe.use_liger_kernel == "true"
    return bool(torch.cuda.is_available() and _is_installed() and not compiles(recipe) and _kernels_of(model_type))


def use_liger(model: Any) -> None:
    """Lets a model use the kernels, in place, before anything is put into it."""
    apply_liger_kernel(model, dict.fromkeys(_OTHERS, False))
    known, config = _kernels_of(model.config.model_type), model.config.get_text_config()
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
    for mlp in decoder_mlps(model).values():
        product, names = _ACTIVATIONS.get(activation, ""), layout_of(mlp)
        kernel = _MLPS.get((product, len(names))) if len(names) == 3 or FUSED in names else None
        if product in known and kernel:
            stock_class(mlp).forward = getattr(_liger(), kernel).forward


def _liger(module: str = "") -> Any:
    return importlib.import_module(f"liger_kernel.transformers.{module}".rstrip("."))


def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _runs_here() -> bool:
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def _kernels_of(model_type: str) -> tuple[str, ...]:
    """Returns what Liger puts into models of a type if nothing is said, by its names; () if it has nothing."""
    known = _liger("monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        return ()
    return tuple(name for name, value in inspect.signature(known[model_type]).parameters.items() if value.default)
