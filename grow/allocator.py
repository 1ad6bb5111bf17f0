"""Memory on a CPU: glibc told to keep what is freed.

By default it gives every large block back to the system, and the next one of the same size (the logits of a step, say)
comes as fresh pages, each zeroed at its first touch: a fifth of a training step. And every thread's own arena grows
with the shapes that it has seen.
"""

import ctypes

import torch

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """From now on in this process; nothing where there is a GPU, whose memory torch keeps by itself, or no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
