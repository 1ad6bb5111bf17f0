"""`compile`: torch.compile of the decoder layers, one by one, which on a GPU makes few and large kernels of many.

All layers of a kind are compiled once, whatever their number. Nothing else of the model is: what stands around the
layers depends on data (labels, masks), or is a product alone. A layer's sums may be taken in another order then, so
that a grown model starts on the bits of its base is promised where neither is compiled.
"""

import importlib.util
import os
import shutil
from typing import Any

import torch

from grow.errors import UserError
from grow.model.layouts import decoder_mlps
from grow.recipe import AUTO, Recipe


def check_compile(recipe: Recipe) -> None:
    """Raises UserError where layers cannot be compiled whole."""
    if recipe.compile == "true" and recipe.zero.get("stage") == 3:
        raise UserError("compile true: not under ZeRO-3, which gathers weights between the operations of a layer")
    if recipe.compile == "true" and not recipe.method_class.compiles:
        raise UserError(f"compile true: {recipe.method} changes each layer in its own way, so none could be shared")
    if recipe.compile == "true" and _missing():
        raise UserError(f"compile true: {_missing()} is not installed; install it, or take compile out")
    if recipe.compile == "true" and recipe.switch:
        raise UserError("compile true: not with a switch, where the shapes in a layer depend on what it decides")


def _missing() -> str:
    """Names what torch's compiler needs and this machine lacks; slim images have no compiler of C, and triton asks for
    one when the first kernel is built."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "triton"
    compilers = ("cc", "gcc", "clang") if torch.cuda.is_available() else ("g++", "clang++")
    named = os.environ.get("CC" if torch.cuda.is_available() else "CXX", "")
    return "" if any(map(shutil.which, (named, *compilers))) else f"a compiler ({compilers[-2]})"


def compiles(recipe: Recipe) -> bool:
    """Says whether a run compiles its layers: "auto" does on GPUs, under ZeRO-1 and 2, without a switch."""
    if recipe.compile != AUTO:
        return recipe.compile == "true"
    can = recipe.zero.get("stage") in (0, 1, 2) and not recipe.switch and recipe.method_class.compiles
    return bool(torch.cuda.is_available() and can and not _missing())


def compile_layers(model: Any) -> None:
    """Compiles the decoder layers of a model, in place; parameters keep their names."""
    for layer in decoder_layers(model):
        layer.compile()


def decoder_layers(model: Any) -> list[Any]:
    """Returns the decoder layers, lowest first."""
    names = {id(mlp): name for name, mlp in model.named_modules()}
    return [model.get_submodule(names[id(mlp)].rpartition(".")[0]) for _, mlp in sorted(decoder_mlps(model).items())]
