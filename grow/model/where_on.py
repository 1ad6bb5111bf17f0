"""Computes what was trained for those tokens alone for which a switch is on; the others are never touched."""

from collections.abc import Callable

import torch
from torch import Tensor


def where_on(
    on: bool | Tensor, x: Tensor, own: Tensor, full: Callable[[Tensor, Tensor], Tensor], every_rank: bool
) -> Tensor:
    """Returns `own` […, out], what the base makes of x […, in], but `full(x, own)` for tokens that are `on`.

    `full` is given tokens that are on, [N, in] and [N, out]. `every_rank`: it has parameters that all ranks gather
    together (ZeRO-3), so it is called on every one of them, if for a token whose result is dropped.
    """
    if on is False and not every_rank:
        return own
    x_NI, own_NO = x.flatten(0, -2), own.flatten(0, -2)
    if isinstance(on, Tensor):
        places = on.flatten().nonzero()[:, 0].to(x.device)
    else:
        places = torch.arange(len(x_NI) if on else 0, device=x.device)
    taken = torch.cat((places, places.new_zeros(1))) if every_rank else places
    sums = full(x_NI[taken], own_NO[taken])[: len(places)]
    return own_NO.index_put((places,), sums).view_as(own)
