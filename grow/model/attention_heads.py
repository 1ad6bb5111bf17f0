"""Heads of attention that have grown: they are copied as an MLP's hidden units are (grow.model.mlp).

    y = (1 − α/2) · O a(Q x, K x, V x) + α · O' a(Q' x, K x, V x)        kind "queries"
    y = (1 − α/2) · O a(Q x, K x, V x) + α · O' a(Q' x, K' x, V' x)      kind "heads"

The copies begin as what they are copies of, O' as O/2. Query heads use the base's own keys and values, and so does a KV
cache; whole heads have their own, which a KV cache holds beside the base's. At step 0 the copies' part is exactly half
of the base's, and the sum of two halves the base's bits.

Where a switch (grow.model.switch) is off for a token, its own output is the base's heads', and so are its keys and
values: those of whole heads that were copied are read by tokens for which it is on.
"""

from typing import Any

import torch
from torch import Tensor

from grow.errors import UserError
from grow.model.layouts import down_layer, mix_in, stock_class, width
from grow.model.mlp import Between, GrownBranch, GrownMLP, with_growth


class GrownAttention(GrownMLP):
    """Is mixed into the class of an attention that is already there, so that the base's tensors keep their names."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Maps […, h] to […, h], and what else the class returns, of the base's own heads."""
        attend, whole = stock_class(self).forward, "k_proj" in self.grown.layout
        if whole and kwargs.get("cache") is not None:
            raise UserError("generate_batch keeps keys of one branch alone, and heads have grown: use generate")
        if kwargs.get("past_key_values") is not None:
            cache = kwargs["past_key_values"] = SameKeys(kwargs["past_key_values"])
            if whole:  # whatever α is, since it may change between uses of a cache
                beside = kwargs | {"past_key_values": _Keys()}
                cache.beside = _keys(attend, self.grown, hidden_states, args, beside)
        on = True if self.switch is None else self.switch.acts(self.training, hidden_states)
        # Under ZeRO-3 ranks gather parameters together, so each computes the same whether its own rows are on or off.
        every_rank = self.switch is not None and hasattr(down_layer(self.grown).weight, "ds_id")
        if self.alpha == 0 or (on is False and not every_rank):
            return attend(self, hidden_states, *args, **kwargs)
        if on is not True or every_rank:
            on = torch.as_tensor(on, device=hidden_states.device).expand(hidden_states.shape[:-1])[..., None]
        own = self if self.trained is None else Between(self, self.trained, self.alpha, on)
        base, *others = attend(own, hidden_states, *args, **kwargs)
        copies = attend(self.grown, hidden_states, *args, **kwargs)[0]
        y = with_growth(copies, base, self.factor, self.alpha)
        return y if on is True else torch.where(on, y, base), *others


class SameKeys:
    """Stands for a KV cache that two branches share. The first that comes has its keys and values put in, with those of
    the other `beside` them as further heads, if that has its own. Each is given what there is of its own."""

    def __init__(self, cache: Any):
        self._cache = cache
        self._seen: Any = None
        self.beside: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns all keys and values that there are now, [batch, heads, tokens, features] each."""
        heads, seen = keys.shape[1], self._seen
        if seen is not None:
            return seen if self.beside is None else tuple(both[:, heads:] for both in seen)
        if self.beside is not None:
            keys, values = torch.cat((keys, self.beside[0]), 1), torch.cat((values, self.beside[1]), 1)
        seen = self._seen = self._cache.update(keys, values, *args, **kwargs)
        return seen if self.beside is None else tuple(both[:, :heads] for both in seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Keys:
    """Stands for a KV cache that is only told of keys and values."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        """Ends the pass that made them."""
        raise _Made((keys, values))


class _Made(Exception):
    """Carries keys and values."""


def _keys(attend: Any, branch: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the keys and values that a branch makes of x, by its own code, which is given _Keys for a cache."""
    try:
        attend(branch, x, *args, **kwargs)
    except _Made as made:
        found: tuple[Tensor, Tensor] = made.args[0]
        return found
    raise AssertionError("an attention that asks no KV cache")


def grow_attention(attention: Any, factor: int, trained_up: bool = False) -> None:
    """Gives an attention copies of the heads of its layout, uninitialised, in place, and where `trained_up` says so
    projections that take the place of its own."""
    mix_in(attention, GrownAttention, "Grown")
    attention.factor, attention.alpha, attention.trained = factor, 1.0, None
    attention.grown = GrownBranch(attention, (factor - 1) * width(attention)).train(attention.training)
    if trained_up:
        attention.add_trained()
