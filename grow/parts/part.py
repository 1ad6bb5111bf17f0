"""What each kind of part of a transformer that can grow says of itself; grow.parts has the table of them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from grow.errors import UserError
from grow.names import LAYERS, TRANSPOSED, is_growth
from grow.plan import Where, parse_layers, ranges, text_config

TENSORS = ("weight", "bias")
"""What a linear layer consists of."""
_NO = ("", "none", "null", "false", "no", "off", "0")


@dataclass(frozen=True)
class Field:
    """A field of recipes, and a flag of `plan` and `expand`, that says what grows. Its type is that of its default."""

    default: str | bool
    help: str


class Tensor(Protocol):
    """What is read of a base's tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the sizes of its dimensions."""

    @property
    def dtype(self) -> str:
        """Returns safetensors' name of its type."""

    @property
    def is_float(self) -> bool:
        """Says whether its type is a floating-point type."""


class Base(Protocol):
    """What is read of a base, on disk or in memory (grow.checkpoint.shards.Checkpoint)."""

    path: Path
    config: dict[str, Any]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Returns what is known of the tensors, by name."""


class Part:
    """A kind of part: what is asked of it, where it is, which matrices it has, and what its stock form needs.

    What is then computed, on disk and in memory, depends on what it is `made_of`:

    - "units": hidden units, whose copies stand beside the base's own, and whose last matrix is divided by k;
    - "heads": heads of attention, in the same way, by a factor of 2;
    - "matrix": one linear map W, of which a copy is added to W/2, whatever k is, and adds no capacity.
    """

    name: ClassVar[str]
    """What it is called in a plan."""
    made_of: ClassVar[Literal["units", "heads", "matrix"]] = "units"
    fields: ClassVar[Mapping[str, Field]] = {}
    """The first says that it grows, or which of its `kinds`; `NAME_layers` says in which layers."""
    kinds: ClassVar[tuple[str, ...]] = ("",)
    has_layers: ClassVar[bool] = True
    of_images: ClassVar[bool] = False
    """Whether it is of the tower for images, or what leads from it: text gives it no gradient."""
    reads_below: ClassVar[int] = 0
    """A switch for it can read the MLP input of so many layers below the lowest that grows, in the same pass."""
    rate: ClassVar[float] = 1.0
    """Where it grows alone, the default learning rate is so many times as high."""
    narrower: ClassVar[str] = ""
    """What is wrong where only some layers have grown; {} are the others."""
    padding: ClassVar[str] = "them with zeros"

    def asked(self, fields: Mapping[str, Any]) -> bool:
        """Says whether fields of a recipe, or flags, ask that it grows."""
        return str(fields.get(next(iter(self.fields), "")) or "").lower() not in _NO

    def planned(self, base: Base, fields: Mapping[str, Any], factor: int) -> Where | None:
        """Returns what of a base grows; None if that is not asked. Raises UserError where it cannot."""
        named = next(iter(self.fields))
        layers = fields.get(f"{self.name}_layers")
        layers = "" if layers is None else str(layers)
        if not self.asked(fields):
            if layers:
                raise UserError(f"--{self.name}-layers: says where, with --{named} {' or '.join(self.kinds)}")
            return None
        kind = str(fields[named]) if self.kinds != ("",) else ""
        if kind not in self.kinds:
            there = f"there {'are' if self.kinds[1:] else 'is'} {' and '.join(self.kinds)}"
            raise UserError(f"--{named} {kind}: {there}")
        return Where(self.checked(base, kind, layers or "all", factor), kind)

    def checked(self, base: Base, kind: str, layers: str, factor: int) -> tuple[int, ...]:
        """Returns the layers that are asked for, ascending. Raises UserError where it cannot grow there."""
        prefixes = self.prefixes(base.tensors)
        if self.has_layers:
            return parse_layers(layers, len(prefixes), f"--{self.name}-layers")
        names = [f"{prefix}.{end}" for prefix in prefixes.values() for end in self.ends(base, prefix, kind)]
        flag = f"--{next(iter(self.fields)).replace('_', '-')}"
        if not names or len(base.tensors[names[0]].shape) != 2:
            raise UserError(f"{flag}: {base.path} has no {self.name} of a single matrix that is known here")
        check_floats(base, f"the {self.name}", names)
        own = [name for name in base.tensors if _above(name)[0] in prefixes.values() and not is_growth(name)]
        left = next((name for name in own if name not in names), "")
        if left:
            raise UserError(f"{flag}: {base.path}: what {left} does to copies is not known here")
        return (0,)

    def prefixes(self, names: Iterable[str]) -> dict[int, str]:
        """Maps each layer that has one to the prefix of its tensors' names; what has no layers is layer 0."""
        modules = dict.fromkeys(part for name in names for part in _above(name))
        found = ((self.layer_of(module), module) for module in modules)
        return {layer: module for layer, module in found if layer is not None}

    def layer_of(self, module: str) -> int | None:
        """Returns the layer of the module of this name, on disk or in memory; None for a module of another kind."""
        raise NotImplementedError

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns the names that its matrices, in a class of transformers, may have; the last maps back."""
        raise NotImplementedError

    def matrices(self, has: Callable[[str], bool], kind: str = "") -> tuple[str, ...]:
        """Returns the names of its matrices where a module `has` them all; () where it does not."""
        return next((names for names in self.layouts(kind) if all(map(has, names))), ())

    def on_disk(self, base: Base, prefix: str, kind: str = "") -> tuple[str, ...]:
        """Returns the names of its matrices among a base's tensors with a prefix; () where they are not there."""
        end = "" if self.made_of == "matrix" else ".weight"
        return self.matrices(lambda name: f"{prefix}.{name}{end}" in base.tensors, kind)

    def ends(self, base: Base, prefix: str, kind: str = "") -> list[str]:
        """Returns how the names of its tensors end, behind a prefix."""
        named = self.on_disk(base, prefix, kind)
        if self.made_of == "matrix":
            return list(named)
        ends = [f"{matrix}.{tensor}" for matrix in named for tensor in TENSORS]
        return [end for end in ends if f"{prefix}.{end}" in base.tensors]

    def words(self, where: Where, factor: int) -> str:
        """Returns what has grown, in words."""
        wider = f", {factor} times as wide" * (self.made_of == "units")
        return self.named(where) + (f" of {in_layers(where)}" * self.has_layers) + wider

    def named(self, where: Where) -> str:
        """Returns what it is, in words, without its layers."""
        return f"the {self.name}"

    def must_be_alone(self, where: Where) -> str:
        """Returns why what has grown cannot be one of several skills on a base, in words; "" if it can."""
        return f"{self.named(where)} cannot be one of several skills"

    def stock_widths(self, base: Base, units: dict[int, int]) -> dict[int, int]:
        """Returns how many hidden units each layer of a stock model has, which are `units` at least."""
        return dict.fromkeys(units, max(units.values()))

    def stock_beside(self, base: Base) -> Mapping[str, str]:
        """Returns tensors that a stock model needs and the base lacks, by name, each with the name of the base's tensor
        that it is."""
        return {}

    def groups(self, base: Base, prefix: str, kind: str) -> int:
        """Returns how many groups of heads share keys and values with their copies."""
        return 1

    def stock_config(self, config: dict[str, Any], base: Base, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Returns the config of a stock model in which it has grown; its tensors have these shapes, by name, and
        `base` has those before."""
        return config


def check_floats(base: Base, what: str, names: Iterable[str]) -> None:
    """Raises UserError unless the tensors of these names, as far as there are such, are in one float type."""
    infos = [base.tensors[name] for name in names if name in base.tensors]
    dtypes = {info.dtype for info in infos}
    if len(dtypes) > 1 or not all(info.is_float for info in infos):
        raise UserError(f"{base.path}: {what} is in {', '.join(sorted(dtypes))}; one float type is needed")


def is_transposed(config: dict[str, Any]) -> bool:
    """Says whether the matrices of a model with this config lie in its files as [in, out]."""
    return text_config(config).get("model_type") in TRANSPOSED


def layer_in(module: str, last: str) -> int | None:
    """Returns the layer of a module whose name ends in it and `last`, such as mlp; None for other names."""
    match = re.search(rf"(?:^|\.){LAYERS}\.(\d+)\.{last}$", module)
    return int(match[1]) if match else None


def in_layers(where: Where) -> str:
    """Returns in which layers something grows, in words."""
    count = len(where.layers)
    return f"{count} layer{'s' * (count != 1)} ({ranges(list(where.layers))})"


def _above(name: str) -> tuple[str, str]:
    """Returns the modules that a tensor may belong to, by its name: `….mlp.gate_proj.weight` to `….mlp.gate_proj`, and
    as a matrix to `….mlp`."""
    module = name.rpartition(".")[0]
    return module, module.rpartition(".")[0]
