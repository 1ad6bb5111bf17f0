"""Block expansion: copies of whole decoder layers, which add nothing at first, train; the base's layers are frozen."""

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from grow.checkpoint.hub import FROM_FOLDER
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.trained_weights import Export
from grow.errors import UserError
from grow.methods.method import Method
from grow.model.layouts import decoder_layers, down_layer
from grow.names import layer_of
from grow.plan import parse_layers, text_config

_UNKNOWN = ("layer_scalar", "per_layer_input_gate", "post_self_attn_layernorm", "post_mlp_layernorm")
"""Parts of a layer that its copy would add by, or be scaled by, as well: Gemma 4, GLM 4."""
_BLOCK = re.compile(r"(.*?(?:layers|h)\.)(\d+)\.blocks\.(\d+)\.(.*)")
_LAYER = re.compile(r"(.*?(?:layers|h)\.)(\d+)\.(.*)")


@dataclass
class Blocks(Method):
    """Trains copies of groups of layers, each group's after its last layer (LLaMA-Pro, arXiv 2401.02415).

    A group is one layer or, where kinds of attention alternate, as many as their pattern has (six in Gemma 3), so that
    a tool that knows the pattern alone reads the result. `block_groups` are the groups that are copied, written as
    `layers` of growth. A copy adds nothing at first: the norms after its attention and its MLP are set to give zero, or
    where there are none, the matrices before them; a zero matrix before such a norm would be scaled up to full size
    after one step.
    """

    stages: ClassVar[tuple[int, ...]] = (0, 1, 2)
    compiles: ClassVar[bool] = False

    block_groups: str = "all"

    def check_names(self, names: Collection[str]) -> None:
        """Raises UserError for a group that cannot be: of a model with fewer layers than it asks for."""
        parse_layers(self.block_groups, 1 + max((layer_of(name) or 0 for name in names), default=0))

    def add_parameters(self, model: Any) -> None:
        """Adds the copies."""
        layers = decoder_layers(model)
        for group in self._groups(model.config.to_dict(), len(layers)):
            originals = [layers[index] for index in group]
            blocks = [_silenced(copy.deepcopy(layer)) for layer in originals]
            _follow(originals, blocks)

    def _groups(self, config: dict[str, Any], count: int) -> list[range]:
        """Returns the layers of each group that is copied, lowest first."""
        size = period(text_config(config).get("layer_types") or ["one"] * count)
        chosen = parse_layers(self.block_groups, count // size)
        return [range(group * size, (group + 1) * size) for group in chosen]

    def added_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the copies, as if each layer were a group."""
        found = {}
        chosen = parse_layers(self.block_groups, 1 + max(layer_of(name) or 0 for name in shapes))
        for name, shape in shapes.items():
            match = _LAYER.fullmatch(name)
            if match and layer_of(name) in chosen:
                found[f"{match[1]}{match[2]}.blocks.0.{match[3]}"] = shape
        return found

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to a copy."""
        return bool(_BLOCK.fullmatch(name)) and layer_of(name) is not None

    def export(self, start: Checkpoint, trained: dict[str, LazyTensor], dtype: str) -> Export:
        """Returns the tensors of a deeper model, and its config."""
        text = dict(text_config(start.config))
        # As the class has it: files may leave kinds of layers to their class's pattern.
        known = transformers.AutoConfig.from_pretrained(start.path, **FROM_FOLDER).get_text_config().to_dict()
        count = known["num_hidden_layers"]
        after = {group[-1]: group for group in self._groups(known, count)}
        order: list[tuple[int, int | None]] = []  # a layer, and which of its blocks, of the deeper model
        for layer in range(count):
            order += [(layer, None), *((layer, block) for block in range(len(after.get(layer, ()))))]
        place = {one: index for index, one in enumerate(order)}
        tensors = {}
        for name in start.tensors:
            match = _LAYER.fullmatch(name)
            if match and layer_of(name) is not None:
                tensors[f"{match[1]}{place[int(match[2]), None]}.{match[3]}"] = start.lazy(name)
        prefix = next(match[1] for name in start.tensors for match in [_LAYER.fullmatch(name)] if match)
        for name, tensor in trained.items():
            match = _BLOCK.fullmatch(name)
            assert match is not None
            tensors[f"{prefix}{place[int(match[2]), int(match[3])]}.{match[4]}"] = tensor
        text["num_hidden_layers"] = len(order)
        kinds = known.get("layer_types")
        if kinds:
            text["layer_types"] = [kinds[layer if block is None else after[layer][block]] for layer, block in order]
        return Export(tensors, {**start.config, "text_config": text} if "text_config" in start.config else text)


def period(kinds: list[str]) -> int:
    """Returns the length of the pattern that kinds of layers repeat; the last time may be cut short."""
    return next(
        size for size in range(1, len(kinds) + 1) if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )


def _silenced(layer: Any) -> Any:
    """Makes a layer add nothing to what goes past it. Raises UserError where it is not known how."""
    unknown = UserError(f"blocks: {type(layer).__name__}: how its copies could add nothing is not known")
    if any(hasattr(layer, name) for name in _UNKNOWN):
        raise unknown
    norms: list[Any] = [
        getattr(layer, name, None) for name in ("post_attention_layernorm", "post_feedforward_layernorm")
    ]
    with torch.no_grad():
        if all(norms) and hasattr(layer, "pre_feedforward_layernorm"):
            for norm in norms:
                norm.weight.fill_(-1.0)  # Gemma's scale by 1 + weight
                if _sounds(norm):
                    norm.weight.zero_()
        else:
            attention: Any = getattr(layer, "self_attn", None)
            if not hasattr(attention, "o_proj") or hasattr(layer, "post_feedforward_layernorm"):
                raise unknown
            for linear in (attention.o_proj, down_layer(layer.mlp)):
                for parameter in linear.parameters():
                    parameter.zero_()
    return layer


def _sounds(norm: nn.Module) -> bool:
    weight: Any = norm.weight
    return bool(norm(torch.ones_like(weight)[None]).abs().sum() > 0)


def _follow(originals: list[Any], blocks: list[Any]) -> None:
    """Lets copies compute after the last of their originals, each with what its own was called with: masks and
    positions are those of its kind of attention."""
    given: dict[int, Any] = {}

    def note(place: int) -> Any:
        return lambda _, args, kwargs: given.__setitem__(place, (args[1:], kwargs))

    for place, layer in enumerate(originals):
        layer.register_forward_pre_hook(note(place), with_kwargs=True)

    def then(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        for place, block in enumerate(blocks):
            args, kwargs = given[place]
            kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            found = block(states, *args, **kwargs)
            states = found[0] if isinstance(found, tuple) else found
        return (states, *output[1:]) if isinstance(output, tuple) else states

    originals[-1].blocks = nn.ModuleList(blocks)
    originals[-1].register_forward_hook(then, with_kwargs=True)
