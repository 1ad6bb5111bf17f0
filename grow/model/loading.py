"""Loads a checkpoint folder, stock or grown, as a model of any class that transformers knows."""

import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from grow.checkpoint.hub import FROM_FOLDER, locate
from grow.checkpoint.shards import Checkpoint, read_json, refuse_adapter
from grow.checkpoint.switch_record import NAME as SWITCH_NAME
from grow.checkpoint.switch_record import read_switch
from grow.errors import UserError
from grow.model import bottleneck
from grow.model.alpha import set_alpha
from grow.model.grown import add_parts
from grow.model.layouts import decoder_mlps
from grow.model.lora import add_gates
from grow.model.skills import add_skills
from grow.model.switched import put_switch, put_switches
from grow.names import VIT_COPIES, canonical
from grow.plan import GrowthPlan, skill_plans

LORA_CONFIG = "adapter_config.json"
_COPIES = {re.escape(on_disk): in_memory for on_disk, in_memory in VIT_COPIES.items()}
"""What transformers is to call a ViT's copies as it loads them, beside those names that it knows."""
_LANGUAGE_MODEL = ("layers.", "embed_tokens.", "norm.", "lm_head.")


def grown_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Derives a class whose constructor attaches the growth that stands in the config.

    So from_pretrained does all the loading: dtype, device, sharding, ZeRO-3 partitions. Do not call save_pretrained on
    its models: transformers maps names only for the classes that it knows. `grow consolidate` writes them.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        plans = skill_plans(config.growth)
        if plans:
            add_skills(self, plans)
            return
        plan = GrowthPlan.from_config({"growth": config.growth})
        assert plan is not None
        add_parts(self, plan)

    members = {"__init__": __init__, "__module__": cls.__module__, "stock_class": cls}
    # Under the stock class's name, which transformers writes to config.json and compares with those that it knows.
    return type(cls.__name__, (cls,), members)


def load(path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", alpha: float = 1.0) -> PreTrainedModel:
    """Loads a stock or a grown checkpoint, from a folder or by its hub name; `dtype` "auto" is the checkpoint's own.

    A folder of an adapter (grow.model.bottleneck) is loaded with its base. `alpha` is the interpolation coefficient of
    a grown or an adapted model: 0 is the base, exactly; 1 the trained model (grow.model.mlp). Raises UserError if the
    checkpoint is not whole: every tensor of the model must be in it, in its shape.
    """
    path = locate(path)
    if (path / bottleneck.CONFIG).is_file():
        return _load_adapter(path, dtype, alpha)
    if is_lora(path):
        return load_lora(path, dtype, alpha)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no checkpoint there (it has no config.json)")
    refuse_adapter(path)
    config, cls = class_of(path)
    how: dict[str, Any] = {"config": config, "dtype": dtype, "key_mapping": _COPIES, "local_files_only": True}
    model, info = cls.from_pretrained(path, output_loading_info=True, **how)
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise UserError(f"{path}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:3]} …")
    set_alpha(model, alpha)
    put_own_switch(model)
    return model.eval()


def put_own_switch(model: Any) -> None:
    """Gives a grown model the switches that stand in its config, if there are any."""
    growth, where = getattr(model.config, "growth", None) or {}, Path(str(model.name_or_path)) / "config.json"
    if "switch" in growth:
        put_switch(model, read_switch(growth["switch"], where))
    skills = growth.get("skills", {})
    found = {name: read_switch(own["switch"], where) for name, own in skills.items() if "switch" in own}
    if found:
        put_switches(model, found)


def class_of(path: Path) -> tuple[Any, type[PreTrainedModel]]:
    """Returns the config of a checkpoint, and the class that it names, with growth if it has grown."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, **FROM_FOLDER)
    except Exception as error:  # a wrong config raises errors of many kinds
        raise UserError(f"{path}: its config.json is not one that transformers reads ({_short(error)})") from error
    try:
        if (path / "generation_config.json").is_file():
            transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        pass  # transformers ignores one that it cannot read
    except Exception as error:
        raise UserError(
            f"{path}: transformers refuses its generation_config.json ({_short(error)}); mend it"
        ) from error
    named = config.architectures
    if not isinstance(named, list) or not named:
        raise UserError(f'{path}: its config.json names no class, such as "architectures": ["Gemma3ForCausalLM"]')
    cls = getattr(transformers, str(named[0]), None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise UserError(f"{path}: transformers {transformers.__version__} has no class {named[0]}")
    return config, cls if getattr(config, "growth", None) is None else grown_class(cls)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_loads(checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint that `load` would refuse, before a weight is read: if transformers does not
    know its class, if that has no head, or if a tensor of the language model is missing or of another shape."""
    path = checkpoint.path
    config, cls = class_of(path)
    try:
        with torch.device("meta"):
            model: Any = cls(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: transformers builds no model of its config.json ({_short(error)})") from error
    if model.get_output_embeddings() is None:
        raise UserError(f"{path}: {cls.__name__} writes no text; a class with a language model's head is needed")
    there = {canonical(name): info.shape for name, info in checkpoint.tensors.items()}
    tied = {canonical(one): canonical(other) for one, other in model.all_tied_weights_keys.items()}
    tied |= {other: one for one, other in tied.items()}
    for name, parameter in model.named_parameters():
        key = canonical(name)
        shape = there.get(key, there.get(tied.get(key, key)))
        if key.startswith(_LANGUAGE_MODEL) and shape != tuple(parameter.shape):
            found = "is missing" if shape is None else f"is {list(shape)}, its config says {list(parameter.shape)}"
            raise UserError(f"{path}: {name} {found}; fetch the checkpoint again")


def _load_adapter(path: Path, dtype: torch.dtype | str, alpha: float) -> PreTrainedModel:
    facts = read_json(path / bottleneck.CONFIG)
    model = load(facts["base"], dtype)
    for mlp in decoder_mlps(model).values():
        bottleneck.adapt_mlp(mlp, facts["adapter_size"])
    tensors = load_file(path / bottleneck.FILE)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if ".mlp.adapter." in name}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise UserError(f"{path}: its adapter does not fit {facts['base']}; was that replaced?")
    model.load_state_dict(tensors, strict=False)
    set_alpha(model, alpha)
    return model.eval()


def is_lora(path: Path) -> bool:
    """Says whether a folder holds an adapter of PEFT's, without a model beside it."""
    return (path / LORA_CONFIG).is_file() and not (path / "config.json").is_file()


def load_lora(path: Path, dtype: torch.dtype | str, alpha: float = 1.0, base: str = "") -> PreTrainedModel:
    """Loads a folder of PEFT's, not merged, on the base that it names, or on another; with its switch, if it has one.
    `alpha` is its interpolation coefficient. Raises UserError for a base that is not there."""
    name = base or read_json(path / LORA_CONFIG).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path}: its {LORA_CONFIG} does not name its base")
    model = _with_adapter(load(name, dtype), path, name)
    _add_gates(model, path)
    if (path / SWITCH_NAME).is_file():
        put_switch(model, read_switch(read_json(path / SWITCH_NAME), path / SWITCH_NAME))
    set_alpha(model, alpha)
    return model.eval()


def _with_adapter(model: PreTrainedModel, path: Path, base: str) -> PreTrainedModel:
    # By PEFT itself: transformers' load_adapter leaves out the magnitudes of a DoRA.
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        if config.is_prompt_learning:
            raise ValueError("it is in the prompt, and not in the model's layers")
        config.inference_mode = True
        adapted = peft.PeftModel(model, config, autocast_adapter_dtype=False)
        found = adapted.load_adapter(str(path), "default", autocast_adapter_dtype=False)
        # The gates are of the baseline `disel`, and put in afterwards.
        without_place = [name for name in found.unexpected_keys if ".lora_gate." not in name]
        if found.missing_keys or without_place:
            name = (found.missing_keys or without_place)[0]
            raise ValueError(f"{name} {'is missing' if found.missing_keys else 'has no place in it'}")
        return adapted.get_base_model()
    except Exception as error:  # the library raises many kinds, all of them about what is in the folder
        raise UserError(f"{path}: PEFT cannot put it on {base} ({_short(error)})") from error


def _add_gates(model: Any, path: Path) -> None:
    """Adds the gates that a folder of the baseline `disel` has among its LoRAs, of which PEFT knows nothing."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file) if file.is_file() else {}
    gates = {name.removeprefix("base_model.model."): t for name, t in tensors.items() if ".lora_gate." in name}
    if gates:
        add_gates(model)
        model.load_state_dict(gates, strict=False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the backward pass recompute each layer's activations, from the lowest layer that trains on."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    # transformers lets the embeddings' output require a gradient, which frozen layers do not need without reentry: it
    # would only carry the backward pass on to the bottom, through layers of which nothing trains.
    model.disable_input_require_grads()


def compute_device() -> str:
    """Returns the device of a model that no launcher places: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype() -> torch.dtype:
    """Returns bf16 if this machine multiplies it in hardware, else fp32: emulated bf16 is many times slower."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
