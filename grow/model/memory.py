"""Memory on a CPU: glibc told to keep what is freed, within bounds.

By default it gives every large block back to the system, and the next one of the same size (the logits of a step, say)
comes as fresh pages, each zeroed at its first touch: a fifth of a training step. And every thread's own arena grows
with the shapes that it has seen.
"""

import ctypes
from typing import Any

import psutil
import torch

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def tune_malloc() -> None:
    """From now on in this process; nothing where there is a GPU, whose memory torch keeps by itself, or no glibc."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


class MallocTrimmer:
    """What small blocks leave unused between large ones, in memory that is kept. They add up: fine-tuning a 270M held
    near its base, whose sequences are of many lengths, takes 0.3 GB more with every step."""

    GROWN = 1.4
    """Times what the process took after its first step, or after the first since holes were given back."""

    def __init__(self) -> None:
        self.libc, self.process, self.settled = _glibc(), psutil.Process(), 0

    def give_back(self) -> None:
        """To be called after every step. If they have grown to much, the system gets their pages; the next step takes
        some seconds more for as many gigabytes."""
        if self.libc is None:
            return
        taken = self.process.memory_info().rss
        if not self.settled:
            self.settled = taken
        elif taken > self.GROWN * self.settled:
            self.libc.malloc_trim(0)
            self.settled = 0


def _glibc() -> Any:
    """None where it is not, or where its memory is not what counts."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and not torch.cuda.is_available() else None
