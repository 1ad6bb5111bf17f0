"""MLPs as transformers' classes have them, whatever their layers are called (grow.names.LAYOUTS).

    y = D · (act(G x) ⊙ (U x))      gate and up apart, or the halves of one matrix; D the down-projection
    y = D · act(U x)                without a gate

What growth adds has the layout of its base, since products of other shapes would round in another way; and it computes
by the code of its base's class, in which dtype and in which order that may be.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grow.errors import UserError
from grow.names import FUSED, INNER, LAYOUTS
from grow.parts import MLPS
from grow.parts.part import Part


def modules_of(model: nn.Module, part: Part) -> dict[int, Any]:
    """Returns the modules of a kind of part, by layer, lowest first; those whose matrices are known."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        layer = part.layer_of(name)
        if layer is not None and part.matrices(has_matrix(module)):
            found[layer] = module
    return dict(sorted(found.items()))


def has_matrix(module: nn.Module) -> Callable[[str], bool]:
    """Returns whether a module has a layer, or a parameter, of a name; a bias that is None is none."""
    return lambda name: getattr(module, name, None) is not None


def decoder_mlps(model: nn.Module) -> dict[int, Any]:
    """Returns the MLPs of the decoder layers, by layer; not those of towers for images and sound."""
    return modules_of(model, MLPS)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder layers that have such an MLP, lowest first."""
    names = {id(module): name for name, module in model.named_modules()}
    return [model.get_submodule(names[id(mlp)].rpartition(".")[0]) for _, mlp in sorted(decoder_mlps(model).items())]


def layout_of(mlp: Any) -> tuple[str, ...]:
    """Returns the names of an MLP's matrices, the down-projection's last; () for a module of another kind. A module
    that has `layout` has been asked before."""
    known: tuple[str, ...] | None = mlp.__dict__.get("layout")
    if known is not None:
        return known
    return next((names for names in LAYOUTS if all(hasattr(mlp, name) for name in names)), ())


def up_names(mlp: Any) -> tuple[str, ...]:
    """Returns the names of the linear layers that read the MLP's input: gate and up, or one of both, or up alone."""
    return layout_of(mlp)[:-1]


def up_layers(mlp: Any) -> list[nn.Linear]:
    """Returns the linear layers that read the MLP's input, whose device and dtype are the MLP's."""
    return [linear_in(getattr(mlp, name)) for name in up_names(mlp)]


def down_name(mlp: Any) -> str:
    """Returns the name of the down-projection."""
    return layout_of(mlp)[-1]


def down_layer(mlp: Any) -> nn.Linear:
    """Returns the down-projection."""
    return linear_in(getattr(mlp, down_name(mlp)))


def linear_in(layer: Any) -> Any:
    """Returns the linear layer in one around it, such as Gemma 4's towers have, or the layer itself."""
    return getattr(layer, INNER, layer)


def halves(mlp: Any) -> int:
    """Returns of how many matrices each of up_layers consists, one above the other."""
    return 2 if up_names(mlp)[0] == FUSED else 1


def hidden_size(mlp: Any) -> int:
    """Returns h."""
    return sizes(up_layers(mlp)[0])[0]


def width(mlp: Any) -> int:
    """Returns the number of hidden units, p."""
    return sizes(up_layers(mlp)[0])[1] // halves(mlp)


def sizes(layer: Any) -> tuple[int, int]:
    """Returns how many features a Linear or a Conv1D, or one in a layer around it, reads, and how many it gives."""
    layer = linear_in(layer)
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def matrix(layer: Any) -> Tensor:
    """Returns a Linear's or a Conv1D's weight as [out, in]."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def layer_like(own: Any, inputs: int, outputs: int, **kind: Any) -> nn.Module:
    """Returns an uninitialised layer of another one's class and with a bias if that has one: Linear, [outputs, inputs],
    or GPT-2's Conv1D, [inputs, outputs]; or in a layer around it. `kind` has device and dtype, if they are not torch's
    defaults."""
    if linear_in(own) is not own:
        return Around(own, layer_like(linear_in(own), inputs, outputs, **kind))
    if isinstance(own, Conv1D):
        return Conv1D(outputs, inputs).to(**kind)
    # Some classes have a linear layer of their own, whose products round in another way (Falcon).
    cls = type(own) if type(own).__init__ is nn.Linear.__init__ else nn.Linear
    return cls(inputs, outputs, bias=own.bias is not None, **kind)


def mix_in(mlp: Any, kind: type, name: str) -> None:
    """Mixes a class into that of an MLP that is already there, so that the base's tensors keep their names."""
    cls: Any = type(mlp)
    mlp.__dict__.setdefault("stock_mlp_class", cls)
    change_class(mlp, mixed(kind, cls, name))


def change_class(module: Any, cls: type) -> None:
    """Gives a module another class, by whose code it computes. Raises UserError where a forward pass that was bound to
    the module itself would go on instead."""
    # accelerate binds one to each module of a model on several devices, around that of the class as it is then.
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
        module.__dict__.pop("forward")
    if "forward" in module.__dict__:
        raise UserError(
            f"{type(module).__name__}: its forward pass was replaced, by Liger's kernels or something of their kind, "
            "which would go on in place of the grown one; grow the model first, and leave MLPs out of them"
        )
    module.__class__ = cls
    if hook is not None:
        add_hook_to_module(module, hook)


@functools.cache
def mixed(kind: type, cls: type, name: str) -> type:
    """Returns the class of all modules of a kind: torch.compile compiles a layer again for a class of its own."""
    return type(f"{name}{cls.__name__}", (kind, cls), {})


def stock_class(mlp: Any) -> Any:
    """Returns the class of an MLP as transformers has it, under what has been mixed in."""
    return mlp.__dict__.get("stock_mlp_class", type(mlp))


class Instead(nn.Module):
    """Computes as an MLP does, by the code of its class, with layers of its own in the place of some; whatever else the
    code asks for (activation, config) is the MLP's."""

    layout: tuple[str, ...] = ()

    def __init__(self, mlp: Any):
        nn.Module.__init__(self)  # not that of a class that is mixed in besides (grow.model.matrix)
        known = {"layout": layout_of(mlp), "stock_mlp_class": stock_class(mlp)}
        mlp.__dict__.update(known)
        self.__dict__.update(known | {"of": (mlp,)})  # in a tuple, else it would be a part of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Marks that DeepSpeed puts on modules are each module's own.
            if name.startswith(("_", "ds_")) or name in self.layout or "of" not in self.__dict__:
                raise
            return getattr(self.__dict__["of"][0], name)

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        result: Tensor = stock_class(self).forward(self, x)
        return result


class Around(Instead):
    """Computes as a layer around a linear one does, with a linear layer of its own; what it clips by is that one's."""

    def __init__(self, layer: Any, linear: nn.Module):
        layer.__dict__["layout"] = (INNER,)
        super().__init__(layer)
        self.add_module(INNER, linear)
