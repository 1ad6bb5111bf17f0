"""Gathers parameters that ZeRO-3 keeps in partitions."""

import contextlib
from typing import Any

from torch import nn


@contextlib.contextmanager
def gathered(*parameters: nn.Parameter) -> Any:
    """Makes the parameters whole on every rank within the context, also if ZeRO-3 keeps them in partitions."""
    if not hasattr(parameters[0], "ds_id"):
        yield
        return
    import deepspeed  # under ZeRO-3 it is imported already; elsewhere the import takes seconds

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield
