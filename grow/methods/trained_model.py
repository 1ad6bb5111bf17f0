"""Opens what a run has trained as a model, in memory."""

from pathlib import Path
from shlex import quote

import torch
from transformers import PreTrainedModel

from grow.checkpoint.metadata import GROWTH_NAME
from grow.checkpoint.switch_record import switch_of_run
from grow.checkpoint.trained_weights import load_trained
from grow.errors import UserError
from grow.methods import METHODS, export_trained
from grow.model import loading
from grow.model.alpha import set_alpha
from grow.model.bottleneck import CONFIG as ADAPTER_CONFIG
from grow.model.in_memory import fill
from grow.names import is_trained_up


def load_model(
    path: str | Path, dtype: torch.dtype | str = "auto", alpha: float = 1.0, start: str = ""
) -> PreTrainedModel:
    """Opens a checkpoint or a finished run; see grow.api.load."""
    folder = Path(path)
    if (folder / GROWTH_NAME).is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: a growth package; load its base, and grow.attach(base, {str(folder)!r})")
    if not (folder / "run.json").is_file():
        return loading.load(path, dtype, alpha)
    if (folder / "result" / ADAPTER_CONFIG).is_file():  # in no other form
        return loading.load(folder / "result", dtype, alpha)
    if (folder / "result" / loading.LORA_CONFIG).is_file() and switch_of_run(folder):  # merged, it could not be off
        return loading.load_lora(folder / "result", dtype, alpha, start)
    source = load_trained(str(folder), start, export=export_trained)
    if source.config is not None or (alpha != 1 and source.plan is None):
        raise UserError(f"{folder}: consolidate it first: grow consolidate {quote(str(folder))} OUT --alpha {alpha:g}")
    model = loading.load(source.start.path, dtype)
    if any(is_trained_up(name) for name in source.trained):
        METHODS["g_train"]().add_parameters(model)
    fill(model, source.trained)
    if source.plan is not None:
        model.config.growth = source.growth_facts()
        set_alpha(model, alpha)
        loading.put_own_switch(model)
    return model
