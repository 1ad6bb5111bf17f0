"""The rows in a batch of sequences, and the token of each that decides whether a switch is on (grow.model.switch).

Shape suffixes: B sequences, L tokens, R rows. Columns count a sequence's tokens, those in a KV cache included.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.switch_record import LOOKS_BACK
from grow.data.labels import IGNORED

NEVER = torch.iinfo(torch.int64).max
"""The column from which a row is on that is off."""
EACH = -1
"""Stands for that column where each token is decided by itself."""


@dataclass(frozen=True)
class Rows:
    """Holds the row of each token, int64 [B, L]; the sequence of each row and the column of its token that decides,
    int64 [R]. `past` columns are in a KV cache. `matters_R` says which rows are used for anything, bool [R], and
    `there_BL` which tokens are no padding; None: all are."""

    row_BL: Tensor
    sequence_R: Tensor
    decides_R: Tensor
    past: int = 0
    matters_R: Tensor | None = None
    there_BL: Tensor | None = None

    def at(self, value_BL: Tensor, decay: float = 0.0) -> Tensor:
        """Returns the values at the tokens that decide, [R]; each a mean with those of the row's tokens before, which
        weigh `decay` times what the next one does (SwitchRecord)."""
        last_R = (self.decides_R - self.past).clamp(0, value_BL.shape[1] - 1)
        if not decay:
            return value_BL[self.sequence_R, last_R]
        sequence_R1, back_W = self.sequence_R[:, None], torch.arange(LOOKS_BACK, device=last_R.device)
        column_RW = (last_R[:, None] - back_W).clamp(0)
        own_RW = self.row_BL[sequence_R1, column_RW] == self.row_BL[self.sequence_R, last_R][:, None]
        own_RW &= last_R[:, None] >= back_W
        if self.there_BL is not None:
            own_RW &= self.there_BL[sequence_R1, column_RW] | (back_W == 0)
        weight_RW = own_RW * decay ** back_W.to(value_BL.dtype)
        return (value_BL[sequence_R1, column_RW] * weight_RW).sum(1) / weight_RW.sum(1)


def packed_rows(position_ids_BL: Tensor, labels_BL: Tensor, there_BL: Tensor | None = None) -> Rows:
    """Returns the rows of packed sequences, which begin where positions do; `labels_BL[b, t]` is the token that should
    follow token t. A row without a label, such as the padding, does not matter; `there_BL` says which tokens are no
    padding."""
    row_BL, sequence_R = _by_positions(position_ids_BL)
    columns_BL = torch.arange(row_BL.shape[1], device=row_BL.device).expand_as(row_BL)
    first_R = torch.full_like(sequence_R, NEVER)
    first_R.scatter_reduce_(0, row_BL.flatten(), columns_BL.where(labels_BL != IGNORED, NEVER).flatten(), "amin")
    matters_R = first_R != NEVER
    return Rows(row_BL, sequence_R, first_R.where(matters_R, 0), matters_R=matters_R, there_BL=there_BL)


def rows_of_inputs(inputs: dict[str, Any], past: int, prompt_length: int | None = None) -> Rows:
    """Returns the rows of a forward pass, from its arguments by name.

    Each sequence is a row, unless positions restart in it and there is no cache: then it is packed. Of a prompt whose
    length is known no later column decides: assisted generation puts guesses behind it.
    """
    ids_BL = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
    count, length = ids_BL.shape
    mask, positions, labels = (inputs.get(name) for name in ("attention_mask", "position_ids", "labels"))
    if labels is not None:  # transformers' own: labels[b, t] is token t
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    there_BL = _no_padding(mask, past, ids_BL)
    columns_L = torch.arange(length, device=ids_BL.device)
    if positions is not None and not past and prompt_length is None and length > 1 and positions.shape[0] == count:
        # Padding before a row may have position 0 as well, or any.
        begins_BL = (positions == 0) & there_BL
        if mask is None or bool((begins_BL.sum(1) > 1).any()):
            positions = torch.ones_like(positions).masked_fill(begins_BL, 0)
            if labels is not None:
                return packed_rows(positions, following, there_BL)
            row_BL, sequence_R = _by_positions(positions)
            last_R = torch.zeros_like(sequence_R).scatter_reduce_(
                0, row_BL.flatten(), columns_L.expand_as(row_BL).where(there_BL, 0).flatten(), "amax"
            )
            return Rows(row_BL, sequence_R, last_R, there_BL=there_BL)
    sequence_R, no_padding_BL = torch.arange(count, device=ids_BL.device), there_BL
    if prompt_length is not None and past < prompt_length:
        there_BL = there_BL & (columns_L < prompt_length - past)
    last_R = columns_L.where(there_BL, -1).amax(1)
    if labels is not None:
        first_R = columns_L.where(following != IGNORED, NEVER).amin(1)
        last_R = last_R.minimum(first_R)
    row_BL = sequence_R[:, None].expand(count, length)
    return Rows(row_BL, sequence_R, last_R.clamp(0) + past, past, there_BL=no_padding_BL)


def _no_padding(mask: Any, past: int, ids_BL: Tensor) -> Tensor:
    """Returns which tokens are no padding, bool [B, L], from an attention mask: of tokens, [B, past + L]; or of pairs,
    [B, 1, L, keys], as it is made for a static cache, for each kind of attention where there are several: there padding
    does not even see itself."""
    length = ids_BL.shape[1]
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -length:].bool()
    if isinstance(mask, Tensor) and mask.ndim == 4 and not past:
        itself_BL = mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :length]
        return (itself_BL if itself_BL.dtype == torch.bool else itself_BL == 0).expand_as(ids_BL)
    return torch.ones_like(ids_BL, dtype=torch.bool)


def without_room(mask: Any, length: int) -> Any:
    """Returns an attention mask for `length` tokens without a KV cache; one made for a static cache has more columns,
    for what comes after them."""
    if isinstance(mask, dict):
        return {kind: without_room(own, length) for kind, own in mask.items()}
    return mask[..., :length] if isinstance(mask, Tensor) and mask.ndim == 4 else mask


def on_tokens(rows: Rows, start_R: Tensor) -> Tensor:
    """Returns which tokens are on, bool [B, L]: those of a row from the column `start_R` on.

    Rows that do not matter are on where all others are, so that such a batch needs no gathering.
    """
    if rows.matters_R is not None:
        start_R = start_R.masked_fill(~rows.matters_R, 0 if bool((start_R[rows.matters_R] == 0).all()) else NEVER)
    columns_L = torch.arange(rows.past, rows.past + rows.row_BL.shape[1], device=rows.row_BL.device)
    return columns_L >= start_R[rows.row_BL]


def called_columns(input_ids_BL: Tensor, tokens: tuple[int, ...], rows: Rows) -> Tensor:
    """Returns for each row the column where `tokens` stand last in its prompt; NEVER where they do not, int64 [R]."""
    length = len(tokens)
    found_R = torch.full_like(rows.decides_R, -1)
    if input_ids_BL.shape[1] >= length:
        windows = input_ids_BL.unfold(1, length, 1)
        hit = (windows == torch.tensor(tokens, device=input_ids_BL.device)).all(-1)
        row, ends = rows.row_BL[:, : hit.shape[1]], rows.row_BL[:, length - 1 :]
        columns = torch.arange(hit.shape[1], device=hit.device).expand_as(hit) + rows.past
        hit = hit & (row == ends) & (columns + length - 1 <= rows.decides_R[row])
        found_R = found_R.scatter_reduce(0, row[hit], columns[hit], "amax")
    return found_R.masked_fill(found_R < 0, NEVER)


def _by_positions(position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row of each token, and the sequence of each row, where a row begins at each position 0. Tokens
    before the first of a sequence belong to its first row."""
    begins_BL = position_ids_BL == 0
    first_B = begins_BL.int().argmax(1)
    begins_BL[torch.arange(len(begins_BL), device=begins_BL.device), first_B] = False
    begins_BL[:, 0] = True
    row_BL = begins_BL.flatten().cumsum(0).view_as(begins_BL) - 1
    return row_BL, begins_BL.nonzero()[:, 0]
