"""Models with a switch, or with one for each of several skills."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grow.checkpoint.switch_record import SwitchRecord
from grow.errors import UserError
from grow.model.features import opens
from grow.model.grown import grown_beside_text, grown_parts
from grow.model.layouts import decoder_mlps, hidden_size, modules_of
from grow.model.lora import highest_unchanged, lora_layers, switch_lora
from grow.model.matrix import GrownMatrix
from grow.model.mlp import GrownMLP
from grow.model.skills import Skilled
from grow.model.switch import Switch
from grow.model.wrapped import unwrapped
from grow.parts import PARTS

MODES = ("auto", "on", "off")


class Switches:
    """Holds the switches of several skills, which decide side by side, and is used as one of them is. What has been
    decided is by skill."""

    def __init__(self, switches: dict[str, Switch]):
        self.switches = switches

    @property
    def mode(self) -> str:
        """Returns the mode that the switches share."""
        return next(iter(self.switches.values())).mode

    @mode.setter
    def mode(self, mode: str) -> None:
        for switch in self.switches.values():
            switch.mode = mode

    @property
    def decided(self) -> dict[str, Tensor | None]:
        """Returns what each has decided."""
        return {name: switch.decided for name, switch in self.switches.items()}

    def of_batch(self, batch: dict[str, Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Does what Switch.of_batch does, for each."""
        return _all(switch.of_batch(batch) for switch in self.switches.values())

    def generating(self, *args: Any) -> contextlib.AbstractContextManager[Any]:
        """Does what Switch.generating does, for each."""
        return _all(switch.generating(*args) for switch in self.switches.values())

    def tokens_on(self, like_BL: Tensor) -> Tensor:
        """Returns for which tokens of the last pass a skill was on, bool [B, L]."""
        return torch.stack([switch.tokens_on(like_BL) for switch in self.switches.values()]).any(0)


@contextlib.contextmanager
def _all(contexts: Iterable[contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class SwitchedModel:
    """Is mixed into the class of a model that has a switch, or several."""

    switch: Switch | Switches

    @property
    def switched(self) -> Any:
        """Returns whether each row of the last pass was on, bool [R], by skill if there are several; None before the
        first pass."""
        return self.switch.decided

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the model does, on or off for each prompt until its answer ends."""
        with self.switch.generating(self, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError: `generate_batch` packs prompts and parts of answers together, of which a switch knows
        nothing. Always off it is the base's."""
        if self.switch.mode != "off":
            raise UserError(
                "generate_batch does not say which tokens are whose, so no switch can decide: use generate, or "
                'grow.set_switch(model, "off") for the base'
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


def put_switch(model: Any, record: SwitchRecord) -> None:
    """Gives a grown model, or one with LoRAs, a switch, in place. Raises UserError if it does not fit."""
    switch = _prepared(model, record)
    _mix_in(model, switch)
    for part in grown_parts(model):
        part.switch = switch
    for lora in lora_layers(model).values():
        switch_lora(lora, switch)


def put_switches(model: Any, records: dict[str, SwitchRecord]) -> None:
    """Gives skills of a model with several their switches, by name, in place. Raises UserError if one does not fit."""
    switches = {name: _prepared(model, record) for name, record in records.items()}
    _mix_in(model, Switches(switches))
    for part in PARTS.values():
        for module in modules_of(model, part).values():
            for name, skill in module.skills.items() if isinstance(module, Skilled) else ():
                skill.switch = switches.get(name)


def _prepared(model: Any, record: SwitchRecord) -> Switch:
    """Returns a switch that is called in every pass of the model."""
    mlps, loras = decoder_mlps(model), lora_layers(model)
    if grown_beside_text(model):
        raise UserError("a switch is decided by text, after what has grown of the tower for images has computed")
    unchanged = [
        layer - part.reads_below
        for part in PARTS.values()
        for layer, module in modules_of(model, part).items()
        if isinstance(module, (GrownMLP, GrownMatrix, Skilled))
    ]
    unchanged += [highest_unchanged(list(loras))] if loras else []
    whole = whole_below(model, len(mlps))
    first_pass = record.layer > min(unchanged, default=len(mlps)) or record.layer >= whole
    check_fits(record, mlps, first_pass, whole)
    switch = Switch(record, first_pass)
    model.register_forward_pre_hook(switch.begin, with_kwargs=True)
    model.register_forward_hook(switch.end, always_call=True)
    if record.kind != "call":
        mlps[record.layer].register_forward_pre_hook(switch.read)
    return switch


def _mix_in(model: Any, switch: Switch | Switches) -> None:
    cls = type(model)
    members = {"__module__": cls.__module__, "stock_class": getattr(cls, "stock_class", cls)}
    model.__class__ = type(cls.__name__, (SwitchedModel, cls), members)
    model.switch = switch


def whole_below(model: nn.Module, count: int) -> int:
    """Returns the layer from which on a model of `count` layers computes of a prompt, in `generate`, the tokens alone
    whose logits are asked for: Gemma 4's layers that share keys and values do. `count` for other models."""
    found = (getattr(module, "first_kv_shared_layer_idx", None) for module in model.modules())
    return min((layer for layer in found if layer is not None), default=count)


def check_fits(record: SwitchRecord, mlps: dict[int, nn.Module], first_pass: bool, whole: int) -> None:
    """Raises UserError for a switch that a model with these MLPs cannot have; `whole`: whole_below."""
    if record.kind == "call":
        return
    if record.layer not in mlps:
        raise UserError(f"the switch reads layer {record.layer}; the model has MLPs in layers {sorted(mlps)}")
    mlp: Any = mlps[record.layer]
    if len(record.weight) != hidden_size(mlp):
        raise UserError(
            f"the switch reads {len(record.weight)} features; the model's hidden size is {hidden_size(mlp)}"
        )
    if record.kind == "token" and record.layer >= whole:
        raise UserError(
            f"a switch for each token reads layer {record.layer}, and from layer {whole} on this model computes of a "
            "prompt its last token alone; let it read one below"
        )
    if record.kind == "token" and first_pass:
        raise UserError(
            f"a switch for each token reads layer {record.layer}, below which training changes the model; let it read "
            "the lowest layer whose MLP grows, or one below it and below all heads that do"
        )


def by_decision(
    model: Any, rows: list[Any], prompt: Callable[[Any], list[int]], score: Callable[[list[Any]], list[Any]]
) -> list[Any]:
    """Returns `score(rows)`, for which each switch of a model is as it decides at the end of a row's `prompt`.

    For code that hands whole rows to a model, and does not say where their prompts end. Rows for which alike is decided
    are scored together.
    """
    own = getattr(model, "switch", None)
    switches = list(own.switches.values()) if isinstance(own, Switches) else [own] if own else []
    switches = [switch for switch in switches if switch.mode == "auto" and switch.record.kind in ("row", "answer")]
    if not switches or not rows:
        return score(rows)
    prompts = [list(prompt(row)) for row in rows]
    decided = list(zip(*(opens(model, switch.record, prompts) for switch in switches), strict=True))
    found: dict[int, Any] = {}
    try:
        for alike in dict.fromkeys(decided):
            for switch, on in zip(switches, alike, strict=True):
                switch.mode = "on" if on else "off"
            part = [index for index, one in enumerate(decided) if one == alike]
            found |= zip(part, score([rows[index] for index in part]), strict=True)
    finally:
        for switch in switches:
            switch.mode = "auto"
    return [found[index] for index in range(len(rows))]


def check_mode(mode: str) -> None:
    """Raises UserError for a value of --switch that there is not."""
    if mode not in MODES:
        raise UserError(f"--switch {mode}: there are {', '.join(MODES)}")


def set_switch(model: Any, mode: str) -> None:
    """Sets a model's switch to "on", to "off" (the base), or to "auto", as it was fitted.

    Raises UserError for another mode, or for a model without a switch.
    """
    if mode not in MODES:
        raise UserError(f"set_switch: {mode!r}: there are {', '.join(MODES)}")
    model = unwrapped(model)
    if not isinstance(model, SwitchedModel):
        raise UserError(f"set_switch: {type(model).__name__} has no switch; fit one (grow fit-switch), or load a run's")
    model.switch.mode = mode


def switch_decided(model: Any) -> Any:
    """Returns what a model's switch decided in the last pass (SwitchedModel.switched), under any wrapper; None if it
    has no switch."""
    return getattr(unwrapped(model), "switched", None)
