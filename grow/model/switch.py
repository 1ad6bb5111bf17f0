"""A switch: what was trained acts where it is needed, and nowhere else; there the model is its base, bit for bit.

A linear classifier reads the base's own features, at a layer that training cannot change:

    on = w · x > threshold        x [h], the input of the MLP of the switch's layer at the end of the prompt

It ends with the token before a row's first label; without labels, with the last one that is not padding. x is a mean
over its last tokens, of which each weighs less than the next (SwitchRecord). What is decided in
the first pass over a prompt holds to the end of the answer, with a KV cache and without. Where the switch's layer lies
above the lowest one that training has changed, a first pass of the base up to that layer decides.

A switch acts whenever the model is not in training mode; one of the kind "call", which is found in the prompt's
tokens, acts in training too. Shape suffixes: B sequences, L tokens, R rows (several in a packed sequence), H hidden
size. Columns count the tokens of a sequence, those in a KV cache included.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import Cache

from grow.checkpoint.switch_record import SwitchRecord
from grow.errors import UserError
from grow.model.alpha import base_inside
from grow.model.kept_cache import empty, note, noted
from grow.model.rows import EACH, NEVER, Rows, called_columns, on_tokens, packed_rows, rows_of_inputs, without_room


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
        self.margin_R: Tensor | None = None  # w · x − threshold of the rows that were last decided by features
        self._weight_H = torch.from_numpy(record.weight)
        self._batch: Rows | None = None  # of a batch whose labels are known
        self._rows: Rows | None = None  # of the pass under way, if something is to be decided in it
        self._asking = self._partitioned = False  # in a pass that decides and does no more; under ZeRO-3
        self._generation: _Generation | None = None  # under way
        self._own = False  # the pass under way is one of it
        self._cache: Any = None  # of the pass under way
        self._start_R: Tensor | None = None  # the column from which each row is on
        self._key = uuid4().hex  # under which a KV cache carries with what it was filled
        self._thread: int | None = None  # that a pass, or a generation, is under way in

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
        self._claim()
        if model.training and self.record.kind != "call":
            self.decided = self._start_R = None
            return
        inputs = _named(model, args, kwargs)
        cache = self._cache = inputs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        generation = self._generation
        self._own = generation is not None and generation.has(inputs, past)
        if generation and self._own:
            generation.began, generation.cache = True, cache
        rows = self._batch or rows_of_inputs(inputs, past, generation.length if generation and self._own else None)
        forced = self._forced(rows.decides_R)
        noted_R = noted(cache, self._key) if past else None
        if forced is not None:
            # What `generate` goes on with it has emptied if need be.
            if noted_R is not None and not self._own and bool((noted_R != int(forced[0])).any()):
                raise UserError(_FILLED_OTHERWISE)
            if self.record.kind == "token" and self.mode == "auto":
                self._rows, self._start_R = rows, forced
            else:
                self._set(rows, forced)
            return
        held_R = generation.held_R if generation and self._own else None
        if past and held_R is None:
            held_R = self._held(noted_R, rows)
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
        score_BL = (x_BLH.detach().float() @ self._weight_H).to(rows.row_BL.device)
        if self.record.kind == "token":
            self.decided = score_BL > self.record.threshold
            self.on = _short(self.decided)
        else:
            self.margin_R = rows.at(score_BL, self.record.decay) - self.record.threshold
            start_R = rows.decides_R if self.record.kind == "answer" else torch.zeros_like(rows.decides_R)
            self._set(rows, start_R.masked_fill(self.margin_R <= 0, NEVER))
        self._rows = None
        if self._asking and not self._partitioned:
            raise _Decided

    def end(self, model: nn.Module, __: Any, output: Any) -> None:
        """Notes with which decision a KV cache was filled. Until the next pass nothing that was trained acts."""
        if getattr(model, "deciding", False) or self._thread != get_ident():
            return
        among = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for cache in (self._cache, *among):
            if isinstance(cache, Cache) and self._start_R is not None:
                note(cache, self._key, self._start_R)
        self._cache, self._last, self.on = None, False if self.on is None else self.on, None
        self._rows = None
        if self._generation is None:
            self._thread = None

    def acts(self, training: bool, x: Tensor) -> bool | Tensor:
        """Returns where what was trained acts on x, [B, L, …], in a module that trains or does not. Between passes it
        does nowhere; but activations that are computed again in the backward pass see what the last pass saw."""
        if training and self.record.kind != "call":
            return self.mode != "off"
        on = (self._last if training else False) if self.on is None else self.on
        if isinstance(on, Tensor) and x.ndim == 3 and x.shape[1] < on.shape[1]:
            return on[:, -x.shape[1] :]  # of a prompt the tokens alone whose logits are asked for (whole_below)
        return on

    def _claim(self) -> None:
        """Raises UserError while another thread runs the model: its switch says of one pass at a time where it is
        on."""
        if self._thread not in (None, get_ident()):
            raise UserError(
                "two threads run a model with a switch at once: let one wait for the other, or give each a copy "
                "(copy.deepcopy)"
            )
        self._thread = get_ident()

    def _forced(self, like_R: Tensor) -> Tensor | None:
        """Returns the column from which rows are on where no features are asked: in the modes "on" and "off"; and
        EACH, where each token is decided by itself. None where rows are to be decided."""
        if self.mode != "auto":
            return torch.full_like(like_R, NEVER if self.mode == "off" else 0)
        return torch.full_like(like_R, EACH) if self.record.kind == "token" else None

    def _held(self, noted_R: Tensor | None, rows: Rows) -> Tensor:
        """Returns the decision that a KV cache was filled with. Raises UserError if that is not known of its rows."""
        if noted_R is None or len(noted_R) != len(rows.decides_R) or bool((noted_R == EACH).any()):
            raise UserError(_FILLED_OTHERWISE)
        return noted_R

    def tokens_on(self, like_BL: Tensor) -> Tensor:
        """Returns which tokens of the last pass were on, bool [B, L], as `like_BL` is shaped."""
        if isinstance(self._last, Tensor):
            return self._last.view_as(like_BL)
        return torch.full_like(like_BL, self._last, dtype=torch.bool)

    def _set(self, rows: Rows, start_R: Tensor) -> None:
        self._start_R, self.decided = start_R, start_R != NEVER
        if self._own and self._generation is not None:
            self._generation.held_R = start_R
        if rows.matters_R is not None:
            self.decided = self.decided[rows.matters_R]
        self.on = _short(on_tokens(rows, start_R))

    def _ask(self, model: Any, inputs: dict[str, Any]) -> None:
        """Runs the base up to the layer that is read, over a prompt without a KV cache, and decides."""
        left_out = ("past_key_values", "labels", "use_cache", "cache_position", "logits_to_keep")
        length = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
        mask = without_room(inputs.get("attention_mask"), length)
        inputs = {name: value for name, value in inputs.items() if name not in left_out} | {"attention_mask": mask}
        # Under ZeRO-3 no pass may end early: every rank gathers the parameters of every layer.
        self._asking, self._partitioned, self.on = True, hasattr(next(model.parameters()), "ds_id"), False
        model.deciding = True
        try:
            with torch.no_grad(), base_inside(model), contextlib.suppress(_Decided):
                model(**inputs, use_cache=False)
        finally:
            self._asking = model.deciding = False

    def _is_stale(self, filled_R: Tensor | None, start_R: Tensor) -> bool:
        """Says whether a KV cache holds other keys than those of the decision just made."""
        if filled_R is None:
            return True
        if self.record.kind == "answer" and self.mode == "auto":
            return bool((filled_R != NEVER).any())  # what was on is an answer of before, a part of the prompt now
        return not torch.equal(filled_R, start_R)

    # What `generate` calls.

    @contextlib.contextmanager
    def generating(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Holds the first decision within the context. A KV cache that was filled with another one is emptied."""
        name_of_ids = "inputs_embeds" if "inputs_embeds" in kwargs else "input_ids"
        ids = kwargs.get(name_of_ids, kwargs.get("inputs", args[0] if args else None))
        cache = kwargs.get("past_key_values")
        kept = cache is not None and cache.get_seq_length() > 0
        settings = kwargs.get("generation_config") or model.generation_config
        in_chunks = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        self._claim()
        outer, self._generation = self._generation, _Generation(name_of_ids, ids, bool(in_chunks))
        try:
            if ids is not None and (kept or in_chunks) and self.record.kind != "call":
                taken = _signature(model.__class__).parameters
                inputs = {name: value for name, value in kwargs.items() if name in taken} | {name_of_ids: ids}
                rows = rows_of_inputs(inputs, 0)
                start_R, self._own = self._forced(rows.decides_R), True
                if start_R is None:
                    self._rows = rows
                    self._ask(model, inputs)
                    start_R = self._generation.held_R
                if kept and start_R is not None and self._is_stale(noted(cache, self._key), start_R):
                    empty(cache, model)
            yield
            held_R = self._generation.held_R
            if held_R is not None and ids is not None:
                self.decided = (held_R != NEVER)[:: max(1, len(held_R) // len(ids))]
        finally:
            self._generation, self._own = outer, False
            if outer is None:
                self._thread = None


@dataclass
class _Generation:
    """What is known of `generate` while it runs: the prompts, [B, L] or [B, L, H], and whether they are read in chunks;
    the KV cache, and from which column each row is on, once it has begun."""

    name: str
    prompts: Tensor | None
    in_chunks: bool
    began: bool = False
    cache: Any = None
    held_R: Tensor | None = None

    @property
    def length(self) -> int | None:
        """Returns the prompts' number of columns."""
        return None if self.prompts is None else self.prompts.shape[1]

    def has(self, inputs: dict[str, Any], past: int) -> bool:
        """Says whether a pass is one of the generation's own, and not of code that it calls. Where nothing is in a KV
        cache, it begins with the prompts, in beam search with each of them several times."""
        given = inputs.get(self.name)
        if past:
            return not self.began or inputs.get("past_key_values") is self.cache
        if self.prompts is None or given is None:
            return True
        length = given.shape[1] if self.in_chunks else self.prompts.shape[1]
        if given.shape[1] < length or len(given) % len(self.prompts):
            return False
        repeated = self.prompts[:, :length].repeat_interleave(len(given) // len(self.prompts), 0)
        return torch.equal(given[:, :length], repeated.to(given.device))


_FILLED_OTHERWISE = (
    "this KV cache was not filled with what the switch says now (or the switch does not know with which decision, or "
    "for which rows, it was filled): start from an empty one, or use model.generate, which fills it again"
)


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


def _short(on_BL: Tensor) -> bool | Tensor:
    """Returns True where all tokens are on, and False where none is."""
    count = int(on_BL.sum())
    return on_BL if 0 < count < on_BL.numel() else count > 0
