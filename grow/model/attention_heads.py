"""Query heads that have grown: an attention whose heads are copied as an MLP's hidden units are (grow.model.mlp).

    y = (1 − α/2) · O a(Q x, K x, V x) + α · O' a(Q' x, K x, V x)

Q' begins as Q and O' as O/2. Keys and values are the base's own, and so is what a KV cache holds. At step 0 the copies'
part is exactly half of the base's, and the sum of two halves the base's bits.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from grow.errors import UserError
from grow.model.layouts import decoder_attentions, mix_in, stock_class, width
from grow.model.mlp import Between, GrownBranch, GrownMLP, grown_mlps, with_growth
from grow.names import QUERIES
from grow.plan import GrowthPlan


class GrownAttention(GrownMLP):
    """Is mixed into the class of an attention that is already there, so that the base's tensors keep their names."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Maps […, h] to […, h], and what else the class returns, of the base's own heads."""
        attend = stock_class(self).forward
        if self.alpha == 0:
            return attend(self, hidden_states, *args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = _SameKeys(kwargs["past_key_values"])
        own = self if self.trained is None else Between(self, self.trained, self.alpha)
        base, *others = attend(own, hidden_states, *args, **kwargs)
        copies = attend(self.grown, hidden_states, *args, **kwargs)[0]
        return with_growth(copies, base, self.factor, self.alpha), *others


class _SameKeys:
    """Stands for a KV cache that two branches share: it takes the keys and values once, and gives both the same."""

    def __init__(self, cache: Any):
        self._cache, self._seen = cache, None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Returns all keys and values that there are now."""
        if self._seen is None:
            self._seen = self._cache.update(*args, **kwargs)
        return self._seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def add_queries(model: nn.Module, plan: GrowthPlan) -> None:
    """Gives the attention of a plan's layers copies of its query heads, uninitialised, in place. Raises UserError where
    the model has no such attention."""
    there = decoder_attentions(model) if plan.attention else {}
    missing = sorted(set(plan.attention) - set(there))
    if missing:
        raise UserError(f"growth of the attention of layers {missing} does not fit the model")
    for layer in plan.attention:
        attention: Any = there[layer]
        attention.__dict__["layout"] = QUERIES
        mix_in(attention, GrownAttention, "Grown")
        attention.factor, attention.alpha, attention.trained = plan.factor, 1.0, None
        attention.grown = GrownBranch(attention, width(attention))
        if plan.trained_up:
            attention.add_trained()


def grown_attentions(model: nn.Module) -> Iterator[Any]:
    """Returns the attentions of a model whose query heads have grown, lowest layer first."""
    return (part for _, part in sorted(decoder_attentions(model).items()) if isinstance(part, GrownAttention))


def grown_parts(model: nn.Module) -> Iterator[Any]:
    """Returns all that has grown in a model: MLPs, then attentions."""
    return itertools.chain(grown_mlps(model), grown_attentions(model))
