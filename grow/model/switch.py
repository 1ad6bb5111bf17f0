"""A switch: what was trained acts where it is needed, and nowhere else; there the model is its base, bit for bit.

A linear classifier reads the base's own features, at a layer that training cannot change:

    on = w · x > threshold        x [h], the input of the MLP of the switch's layer at the token that decides

That token is the one before a row's first label; without labels, the last one that is not padding. What is decided in
the first pass over a prompt holds to the end of the answer, with a KV cache and without. Where the switch's layer lies
above the lowest one that training has changed, a first pass of the base up to that layer decides.

A switch acts whenever the model is not in training mode; one of the kind "call", which is found in the prompt's
tokens, acts in training too. Shape suffixes: B sequences, L tokens, R rows (several in a packed sequence), H hidden
size. Columns count the tokens of a sequence, those in a KV cache included.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from grow.checkpoint.switch_record import SwitchRecord
from grow.errors import UserError
from grow.model.alpha import base_inside
from grow.model.rows import NEVER, Rows, called_columns, on_tokens, packed_rows, rows_of_inputs


class Switch:
    """Decides, in each forward pass of a model, where what was trained acts.

    `on` says it of the pass under way: True, False, or bool [B, L]; None between passes. `decided` says of each row of
    the last pass whether it was on, bool [R]; for the kind "token" of each token, bool [B, L]; None in training.
    """

    def __init__(self, record: SwitchRecord, first_pass: bool):
        self.record, self.first_pass = record, first_pass
        self.mode = "auto"
        self.on: bool | Tensor | None = None
        self._last: bool | Tensor = False  # what `on` was in the last pass
        self.decided: Tensor | None = None
        self._weight_H = torch.from_numpy(record.weight)
        self._batch: Rows | None = None  # of a batch whose labels are known
        self._rows: Rows | None = None  # of the pass under way, if something is to be decided in it
        self._asking = self._partitioned = False  # in a pass that decides and does no more; under ZeRO-3
        self._generating = False
        self._cache: Any = None  # of the pass under way
        self._prompt_length: int | None = None  # in `generate`
        self._start_R: Tensor | None = None  # the column from which each row is on
        self._key = uuid4().hex  # under which a KV cache carries with what it was filled

    @contextlib.contextmanager
    def of_batch(self, batch: dict[str, Tensor]) -> Iterator[None]:
        """Lets passes over packed sequences, within the context, decide at the token before each row's first label.

        `batch` holds position_ids and labels, int64 [B, L]; `labels[b, t]` is the token that should follow token t.
        """
        self._batch = packed_rows(batch["position_ids"], batch["labels"])
        try:
            yield
        finally:
            self._batch = None

    # Hooks of every forward pass: begin, read from within it, end. They are methods, so that a copy of the model has
    # those of its own switch.

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds where this pass is to decide, and decides already if it need not read features for it."""
        if getattr(model, "deciding", False):  # in a pass that decides and does no more, this switch's or another's
            return
        if model.training and self.record.kind != "call":
            self.decided = self._start_R = None
            return
        inputs = _named(model, args, kwargs)
        cache = self._cache = inputs.get("past_key_values")
        if self.mode != "auto":
            rows = self._batch or rows_of_inputs(inputs, 0)
            self._set(rows, torch.full_like(rows.decides_R, NEVER if self.mode == "off" else 0))
            return
        past = cache.get_seq_length() if cache is not None else 0
        rows = self._batch or rows_of_inputs(inputs, past, self._prompt_length if self._generating else None)
        if self.record.kind == "token":
            self._rows, self._start_R = rows, None
            return
        held_R = self._start_R if self._generating else self._held(cache, rows) if past else None
        if held_R is not None:
            # In beam search each sequence stands in the batch several times.
            self._set(rows, held_R.repeat_interleave(max(1, len(rows.decides_R) // len(held_R))))
        elif self.record.kind == "call":
            self._set(rows, called_columns(inputs["input_ids"], self.record.tokens, rows))
        else:
            self._rows = rows
            if self.first_pass:
                self._ask(model, inputs)

    def read(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Decides, from the input of the MLP of the switch's layer, [B, L, H]."""
        rows, x_BLH = self._rows, inputs[0]
        if rows is None:
            return
        self._weight_H = self._weight_H.to(x_BLH.device)
        # A model may be spread over devices; what is decided is where its inputs are.
        on_BL = (x_BLH.detach().float() @ self._weight_H > self.record.threshold).to(rows.row_BL.device)
        if self.record.kind == "token":
            self.decided, self.on = on_BL, _short(on_BL)
        else:
            on_R = rows.at(on_BL)
            start_R = rows.decides_R if self.record.kind == "answer" else torch.zeros_like(rows.decides_R)
            self._set(rows, start_R.masked_fill(~on_R, NEVER))
        self._rows = None
        if self._asking and not self._partitioned:
            raise _Decided

    def end(self, model: nn.Module, __: Any, output: Any) -> None:
        """Notes with which decision a KV cache was filled. Until the next pass nothing that was trained acts."""
        if getattr(model, "deciding", False):
            return
        among = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for cache in (self._cache, *among):
            if isinstance(cache, Cache) and self._start_R is not None:
                _note(cache, self._key, self._start_R)
        self._cache, self._last, self.on = None, False if self.on is None else self.on, None

    def acts(self, training: bool) -> bool | Tensor:
        """Returns where what was trained acts, in a module that trains or does not. Between passes it does nowhere; but
        activations that are computed again in the backward pass see what the last pass saw."""
        if training and self.record.kind != "call":
            return self.mode != "off"
        if self.on is None:
            return self._last if training else False
        return self.on

    def _held(self, cache: Any, rows: Rows) -> Tensor:
        """Returns with which decision a KV cache was filled. Raises UserError if that is not known of its rows."""
        held_R = _noted(cache, self._key)
        if held_R is None or len(held_R) != len(rows.decides_R):
            raise UserError(
                "the switch does not know with which decision this KV cache was filled (or for which rows): start from "
                "an empty one, or use model.generate, which fills it again"
            )
        return held_R

    def tokens_on(self, like_BL: Tensor) -> Tensor:
        """Returns which tokens of the last pass were on, bool [B, L], as `like_BL` is shaped."""
        return self._last if isinstance(self._last, Tensor) else torch.full_like(like_BL, self._last, dtype=torch.bool)

    def _set(self, rows: Rows, start_R: Tensor) -> None:
        self._start_R, self.decided = start_R, start_R != NEVER
        if rows.matters_R is not None:
            self.decided = self.decided[rows.matters_R]
        self.on = _short(on_tokens(rows, start_R))

    def _ask(self, model: Any, inputs: dict[str, Any]) -> None:
        """Runs the base up to the layer that is read, over a prompt without a KV cache, and decides."""
        left_out = ("past_key_values", "labels", "use_cache", "cache_position", "logits_to_keep")
        inputs = {name: value for name, value in inputs.items() if name not in left_out}
        # Under ZeRO-3 no pass may end early: every rank gathers the parameters of every layer.
        self._asking, self._partitioned, self.on = True, hasattr(next(model.parameters()), "ds_id"), False
        model.deciding = True
        try:
            with torch.no_grad(), base_inside(model), contextlib.suppress(_Decided):
                model(**inputs, use_cache=False)
        finally:
            self._asking = model.deciding = False

    def _is_stale(self, filled_R: Tensor | None) -> bool:
        """Says whether a KV cache holds another model's keys than those of the decision just made."""
        if filled_R is None:
            return True
        if self.record.kind == "answer":  # what was on is an answer of before, which is a part of the prompt now
            return bool((filled_R != NEVER).any())
        return not torch.equal(filled_R, self._start_R)  # type: ignore[arg-type]

    # What `generate` calls.

    @contextlib.contextmanager
    def generating(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Holds the first decision within the context. A KV cache that was filled with another one is emptied."""
        self._generating, self._start_R = True, None
        name_of_ids = "inputs_embeds" if "inputs_embeds" in kwargs else "input_ids"
        ids = kwargs.get(name_of_ids, kwargs.get("inputs", args[0] if args else None))
        self._prompt_length = None if ids is None else ids.shape[1]
        try:
            cache = kwargs.get("past_key_values")
            kept = cache is not None and cache.get_seq_length() > 0
            settings = kwargs.get("generation_config") or model.generation_config
            in_chunks = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
            if (
                self.mode == "auto"
                and self.record.kind in ("row", "answer")
                and ids is not None
                and (kept or in_chunks)
            ):
                taken = _signature(model.__class__).parameters
                inputs = {name: value for name, value in kwargs.items() if name in taken} | {name_of_ids: ids}
                self._rows = rows_of_inputs(inputs, 0)
                self._ask(model, inputs)
                if kept and self._is_stale(_noted(cache, self._key)):
                    _empty(cache, model)
            yield
            if self.decided is not None and ids is not None and self.decided.ndim == 1:
                self.decided = self.decided[:: max(1, len(self.decided) // len(ids))]
        finally:
            self._generating = False


class _Decided(Exception):
    """Ends a pass that only decides."""


@functools.cache
def _signature(cls: type[Any]) -> inspect.Signature:
    """Returns the signature of a class's forward, which every pass, and so every token, asks for."""
    return inspect.signature(cls.forward)


def _named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a forward pass by name; those that are None are left out."""
    given = dict(_signature(model.__class__).bind_partial(model, *args, **kwargs).arguments)
    given.pop("self", None)
    given |= given.pop("kwargs", {})
    return {name: value for name, value in given.items() if value is not None}


def _noted(cache: Any, key: str) -> Tensor | None:
    """Returns from which column each row of a KV cache was on, if a switch has noted it there, int64 [R]."""
    return getattr(cache, "switched", {}).get(key)


def _note(cache: Any, key: str, start_R: Tensor) -> None:
    """Notes it in the cache itself, whose copies have it too, and whose rows may be chosen and change places."""
    if not hasattr(cache, "switched"):
        cache.switched = {}
        cls = type(cache)
        cache.__class__ = type(cls.__name__, (_NotedCache, cls), {"__module__": cls.__module__})
    cache.switched[key] = start_R


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


def _short(on_BL: Tensor) -> bool | Tensor:
    """Returns True where all tokens are on, and False where none is."""
    count = int(on_BL.sum())
    return on_BL if 0 < count < on_BL.numel() else count > 0


def _empty(cache: Any, model: Any) -> None:
    """Empties a KV cache in place, so that `generate` computes the whole prompt."""
    if isinstance(cache, DynamicCache):
        cache.layers = DynamicCache(config=model.config).layers
    else:
        cache.reset()
