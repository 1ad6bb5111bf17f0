"""A KV cache carries with which decision of a switch it was filled: in itself, whose copies have it too, and whose rows
may be chosen and change places."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def noted(cache: Any, key: str) -> Tensor | None:
    """Returns from which column each row of a KV cache was on, if a switch has noted it there, int64 [R]."""
    return getattr(cache, "switched", {}).get(key)


def note(cache: Any, key: str, start_R: Tensor) -> None:
    """Notes it in a cache."""
    if not hasattr(cache, "switched"):
        cls: Any = type(cache)
        cache.switched, cache.__class__ = {}, _with_notes(cls)
    cache.switched[key] = start_R


@functools.cache
def _with_notes(cls: type) -> type:
    return type(cls.__name__, (_NotedCache, cls), {"__module__": cls.__module__})


class _NotedCache:
    """Is mixed into the class of a KV cache that carries notes, which follow its rows."""

    switched: dict[str, Tensor]

    def _follow(self, change: Callable[[Tensor], Tensor]) -> None:
        self.switched = {key: change(start_R) for key, start_R in self.switched.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows in another order."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._follow(lambda start_R: start_R[beam_idx.to(start_R.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._follow(lambda start_R: start_R[torch.as_tensor(indices, device=start_R.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._follow(lambda start_R: start_R.repeat_interleave(repeats))


def empty(cache: Any, model: Any) -> None:
    """Empties a KV cache in place, so that `generate` computes the whole prompt."""
    if isinstance(cache, DynamicCache):
        cache.layers = DynamicCache(config=model.config).layers
    else:
        cache.reset()
