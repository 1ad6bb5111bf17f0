"""The method itself: a gated MLP that has grown.

The base's MLP computes y = D · (act(G x) ⊙ (U x)). Growing it by a factor k adds k−1 copies of the hidden units and
divides every down-projection by k ("Grow, Don't Overwrite", arXiv 2603.08647, section on growing the MLP). Here the
base's own weights stay as they are, unscaled, and the added copies are a second branch:

    y = base(x) / k + grown(x)                                     at α = 1
    y = (1 − α(k−1)/k) · base(x) + α · grown(x)                    α from 0, the base, to 1, the trained model

Where the original up-projection trains as well (G-Train), a copy of it takes its place in base(x):
act(G x) ⊙ (U x) with G + α (G' − G) for G and U + α (U' − U) for U.

At step 0 grown(x) is (k−1)/k · base(x). For k = 2 the halving is exact in binary floating point and so is the sum of
two halves: the grown model's output is the base's bit for bit. One concatenated MLP would sum in another order.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grow.model.layouts import (
    Around,
    Instead,
    down_layer,
    down_name,
    hidden_size,
    layer_like,
    layout_of,
    mix_in,
    sizes,
    stock_class,
    up_names,
    width,
)
from grow.model.where_on import where_on


class GrownBranch(Instead):
    """Holds the added copies: gate and up of shape [(k−1)·p, h], one below the other where the base has them so, and
    down of shape [h, (k−1)·p] (already divided by k); in a GPT-2 all of them transposed.

    They have biases where the base has them; the down-projection's is one, [h], times (k−1)/k.
    """

    def __init__(self, mlp: Any, units: int):
        super().__init__(mlp)
        add_up(self, mlp, units)
        self.add_module(down_name(mlp), layer_like(getattr(mlp, down_name(mlp)), units, hidden_size(mlp)))


class GrownMLP:
    """Is mixed into the class of an MLP that is already there, so that the base's tensors keep their names."""

    factor: int
    alpha: float | Tensor
    own_alpha: float = 1.0
    training: bool
    switch: Any = None  # grow.model.switch.Switch, if the model has one
    grown: GrownBranch
    trained: Any

    def add_trained(self, **kind: Any) -> None:
        """Adds `trained`, an up-projection that replaces the base's own: gate and up, [p, h], uninitialised.

        `kind` has device and dtype, if they are not torch's defaults.
        """
        self.trained = up_projection(self, **kind)

    def _base(self, x: Tensor) -> Tensor:
        if self.trained is None or self.alpha == 0:
            return super().forward(x)  # type: ignore[misc]
        return trained_base(self, self.trained, x, self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        if self.alpha == 0:
            return self._base(x)
        on = True if self.switch is None else self.switch.acts(self.training, x)
        every_rank = self.switch is not None and hasattr(down_layer(self).weight, "ds_id")
        if on is True and not every_rank:
            return self._with_growth(x, self._base(x))

        def full(chosen: Tensor, own: Tensor) -> Tensor:
            return self._with_growth(chosen, own if self.trained is None else self._base(chosen))

        return where_on(on, x, super().forward(x), full, every_rank)  # type: ignore[misc]

    def _with_growth(self, x: Tensor, base: Tensor) -> Tensor:
        """Adds what the copies make of x, […, h], to the base's output, […, h]."""
        return with_growth(self.grown(x), base, self.factor, self.alpha)


class ClippingMLP(GrownMLP):
    """Is a grown MLP that clips what comes out of it (Gemma 4's towers): the sum, as one MLP of all units does."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        bounds = getattr(self, down_name(self)).get_buffer
        return super().forward(x).clamp(bounds("output_min"), bounds("output_max"))


class Unclipped:
    """Is mixed into the class of such an MLP's down-projections, which then leave that to it."""

    linear: nn.Module
    input_min: Tensor
    input_max: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, p] to […, h]."""
        return self.linear(x.clamp(self.input_min, self.input_max))


def trained_base(mlp: Any, trained: Any, x: Tensor, alpha: float | Tensor) -> Tensor:
    """Returns what an MLP makes of x, […, h], with gate and up in the place of its own (G-Train)."""
    result: Tensor = stock_class(mlp).forward(Between(mlp, trained, alpha), x)
    return result


class Between:
    """Stands for an MLP whose gate and up lie between its own and trained ones; or for such an attention, whose
    queries, keys and values do. Where it is not `on`, bool [..., 1], they are its own."""

    def __init__(self, mlp: Any, trained: Any, alpha: float | Tensor, on: Tensor | Literal[True] = True):
        self._mlp, self._trained, self._alpha, self._on = mlp, trained, alpha, on

    def __getattr__(self, name: str) -> Any:
        own, alpha = getattr(self._mlp, name), self._alpha
        if name not in self._trained._modules:
            return own
        after = getattr(self._trained, name)
        # Interpolates outputs, which for linear layers is the same as weights. Weights may be in ZeRO-3 partitions.
        if not (isinstance(alpha, float | int) and alpha == 1):
            after = _between(own, after, alpha)
        return after if self._on is True else lambda x: torch.where(self._on, after(x), own(x))


def _between(own: Any, after: Any, alpha: float | Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(after, Around):
        return lambda x: trained_base(own, after, x, alpha)
    return lambda x: torch.lerp(own(x), after(x), alpha)


def with_growth(grown: Tensor, base: Tensor, k: int, alpha: float | Tensor) -> Tensor:
    """Returns (1 − α(k−1)/k) · base + α · grown, […, h]."""
    if alpha != 1:
        grown = alpha * grown
    share = 1 - alpha * (k - 1) / k
    if isinstance(share, Tensor):  # α is being learnt (grow.evaluation.learn_alphas)
        return grown + share * base
    return torch.add(grown, base, alpha=share)


def grow_mlp(mlp: Any, factor: int, trained_up: bool = False) -> None:
    """Gives an MLP (grow.model.layouts) its added copies, in place, and where `trained_up` says so gate and up that
    take the place of its own.

    They are not initialised: a checkpoint's loader fills them.
    """
    clips = getattr(getattr(mlp, down_name(mlp)), "use_clipped_linears", False)
    mix_in(mlp, ClippingMLP if clips else GrownMLP, "Grown")
    mlp.factor, mlp.alpha, mlp.trained = factor, 1.0, None
    mlp.grown = GrownBranch(mlp, (factor - 1) * width(mlp)).train(mlp.training)
    for half in (mlp, mlp.grown) if clips else ():
        mix_in(getattr(half, down_name(mlp)), Unclipped, "Unclipped")
    if trained_up:
        mlp.add_trained()


def up_projection(mlp: Any, **kind: Any) -> nn.Module:
    """Returns gate and up, [p, h], as an MLP has them, uninitialised. `kind` has device and dtype, if they are not
    torch's defaults."""
    made = nn.Module()
    add_up(made, mlp, width(mlp), **kind)
    return made


def add_up(module: nn.Module, mlp: Any, units: int, **kind: Any) -> None:
    """Gives a module gate and up of so many hidden units, in the layout of an MLP, uninitialised."""
    module.__dict__["layout"] = layout_of(mlp)
    for name in up_names(mlp):
        own = getattr(mlp, name)
        # Keys and values have fewer heads than queries, gate and up in one matrix are twice the units.
        module.add_module(name, layer_like(own, hidden_size(mlp), units * sizes(own)[1] // width(mlp), **kind))
