"""Parameters that ZeRO-3 keeps in partitions, whole for a while."""

import contextlib
from typing import Any

from torch import nn


@contextlib.contextmanager
def gathered(*parameters: nn.Parameter) -> Any:
    """The whole parameters on every rank, also where ZeRO-3 keeps them in partitions."""
    if not hasattr(parameters[0], "ds_id"):
        yield
        return
    import deepspeed  # where ZeRO-3 is at work it is imported already; elsewhere it takes seconds

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield
