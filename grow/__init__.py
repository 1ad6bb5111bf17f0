"""Grow, don't overwrite: fine-tuning without forgetting, by growing the MLPs of a language model.

For a training loop of your own:

    model = AutoModelForCausalLM.from_pretrained("google/gemma-3-1b-pt")
    grow.grow_model(model, layers="0-8")                  # computes exactly what it did
    parameters = grow.trainable(model, "g_freeze")        # the added copies; all else is frozen
    …                                                     # Trainer, TRL, or a loop of your own
    grow.save_growth(model, "french-growth")              # what was added, and whose base it is for
    grow.to_stock(model, "gemma-french")                  # or a checkpoint that loads anywhere

    grow.attach(base, "french-growth")                    # on the same base, loaded anew
    grow.set_alpha(base, 0.5)                             # between the base (0) and what was trained (1)
    grow.set_switch(base, "off")                          # or "on", or "auto", as it was fitted; if it has a switch
    grow.load("runs/gemma3_1b-translation-g_freeze")      # a grown checkpoint, or a finished run

Recipes, launchers and offline conversion are commands: `grow --help`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grow.api import attach, grow_model, load, save_growth, set_alpha, set_switch, to_stock, trainable
    from grow.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "UserError", "attach", "grow_model", "load", "save_growth", "set_alpha", "set_switch", "to_stock", "trainable",
]  # fmt: skip
# Names are resolved when they are used: `import grow` itself loads neither torch nor transformers.
_PLACES = dict.fromkeys(__all__, "grow.api") | {"UserError": "grow.errors"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'grow' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
