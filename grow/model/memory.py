"""Makes glibc keep freed memory on a CPU, within bounds.

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
    """Makes glibc keep freed memory, from now on in this process, by mallopt(3). Does nothing without glibc, or where
    there is a GPU, whose memory torch keeps by itself."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


class MallocTrimmer:
    """Gives the holes in kept memory, which small blocks leave between large ones, back to the system. They add up:
    fine-tuning a 270M with KL regularisation towards the frozen base, whose sequences are of many lengths, takes 0.3 GB
    more with every step."""

    GROWN = 1.4
    """A trim is due when the process takes this many times the memory of its first step since the last trim."""

    def __init__(self) -> None:
        self.libc, self.process, self.settled = _glibc(), psutil.Process(), 0

    def trim(self) -> None:
        """Trims if the holes have grown too much; call it after every step. The step after a trim takes longer, by some
        seconds for some gigabytes."""
        if self.libc is None:
            return
        taken = self.process.memory_info().rss
        if not self.settled:
            self.settled = taken
        elif taken > self.GROWN * self.settled:
            self.libc.malloc_trim(0)
            self.settled = 0


def _glibc() -> Any:
    """Returns glibc; None if it is not there, or on a GPU, where its memory does not matter."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and not torch.cuda.is_available() else None
