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
from grow.model.layouts import decoder_layers
from grow.recipe import AUTO, Recipe

_GRAPHS = 64


def check_compile(recipe: Recipe) -> None:
    """Raises UserError where layers cannot be compiled whole."""
    if recipe.compile == "true" and recipe.zero.get("stage") == 3:
        raise UserError("compile true: not under ZeRO-3, which gathers weights between the operations of a layer")
    if recipe.compile == "true" and not recipe.method_class.compiles:
        raise UserError(f"compile true: {recipe.method} changes each layer in its own way, so none could be shared")
    if recipe.compile == "true" and recipe.switch:
        raise UserError("compile true: not with a switch, where the shapes in a layer depend on what it decides")


def check_compiler(recipe: Recipe) -> None:
    """Raises UserError if this machine cannot compile what is to be compiled."""
    if recipe.compile == "true" and missing_compiler():
        raise UserError(f"compile true: {missing_compiler()} is not installed; install it, or take compile out")


def missing_compiler() -> str:
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
    can = recipe.zero.get("stage", 0) < 3 and not recipe.switch and recipe.method_class.compiles
    return bool(torch.cuda.is_available() and can and not missing_compiler())


def not_compiled() -> Any:
    """Returns a context in which layers run as they are: validation and the like, whose batches have other shapes. So
    what training compiles does not depend on them."""
    return torch.compiler.set_stance("force_eager")


def compile_layers(model: Any) -> None:
    """Compiles the decoder layers of a model, in place; parameters keep their names."""
    # All layers share their code, and with it torch's limit of 8 graphs: the lowest one's, those of layers that have
    # not grown, of both kinds of attention, of the base inside.
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in decoder_layers(model):
        layer.compile()
