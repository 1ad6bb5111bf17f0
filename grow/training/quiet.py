"""Silences libraries while they are imported or called."""

import contextlib
import logging
from collections.abc import Iterator


def hush_accumulation() -> None:
    """Hides accelerate's warning that DeepSpeed accumulates gradients, where Trainer leaves that to it on purpose."""
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "accumulation steps mismatch" not in record.msg
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses log messages below the level of an error: beside a command's one line they are useless."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
