"""The model and the tokenizer of a checkpoint or of a run, to be used."""

from pathlib import Path
from typing import Any

from grow.checkpoint.hub import locate
from grow.checkpoint.shards import read_json
from grow.data.tokenizer import load_tokenizer
from grow.errors import UserError
from grow.evaluation.interpolation import holds_base, refuse_package
from grow.methods.trained_model import load_model
from grow.model.loading import compute_device, compute_dtype
from grow.model.memory import tune_malloc
from grow.model.switched import check_mode, set_switch


def model_and_tokenizer(path: str, switch: str = "auto", needs_base: bool = False) -> tuple[Any, Any]:
    """Returns a model, where this machine computes and in its dtype, and the tokenizer; `switch` sets the model's.

    Raises UserError as grow.methods.trained_model.load_model does, and for another `switch` than "auto", or
    `needs_base`, where a checkpoint has no base inside.
    """
    run = Path(path) / "run.json"
    check_mode(switch)
    refuse_package(Path(path))
    if (needs_base or switch != "auto") and not run.is_file() and not holds_base(locate(path)):
        raise UserError(f"{path}: has no base inside; name a grown checkpoint, a run by growth, or a LoRA's result")
    tokenizer = load_tokenizer(str(read_json(run).get("start")) if run.is_file() else path)
    tune_malloc()
    model = load_model(path, compute_dtype()).to(compute_device())
    if switch != "auto":
        set_switch(model, switch)
    return model, tokenizer
