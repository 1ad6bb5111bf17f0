"""Every replacement of DeepSpeed's private parts stands here, one idea a file, for the version it was written for.

With any other version they step aside, and rank 0 says so: the run computes the same, slower. Whoever moves to a new
version reads the files beside what they replace, runs tests/training/test_deepspeed_patches.py, and raises WRITTEN_FOR.

The table has the time of a step without each patch over that with it (tests/benchmarks/patches.py: real 270M, two
cores, ZeRO-1; in brackets processor time, which other processes do not disturb), and the upstream issue it waits for:

| | SFT, all trains | G-Freeze | spares | upstream |
|---|---|---|---|---|
| adam_step | 1.25 to 1.33 (1.10 to 1.12) | 1.08 (1.03) | 6 bytes a value that trains | no issue found |
| gradient_norm | 1.07 to 1.08 (1.03 to 1.04) | 1.00 (1.00) | 8 bytes a value of the largest gradient | no issue found |
| checkpoint_engine, of a save | 4.1 to 6.3 (5.8) | 1.8 to 3.1 (3.1) | reading a checkpoint back | no issue found |

deepspeedai/DeepSpeed#8331 lets the norm be left out altogether where nothing is clipped; these recipes clip.
"""

import sys
from typing import Any

import deepspeed
import torch.distributed as dist

from grow.training.deepspeed_patches.adam_step import step_by_blocks
from grow.training.deepspeed_patches.checkpoint_engine import StreamEngine
from grow.training.deepspeed_patches.gradient_norm import one_pass_norm
from grow.training.deepspeed_patches.module_walks import fewer_walks

WRITTEN_FOR = "0.19.8"


def patch_engine(engine: Any) -> None:
    """Applies all patches to an engine that has not trained yet, in place; none if DeepSpeed has another version."""
    version = deepspeed.__version__.partition("+")[0]
    if version != WRITTEN_FOR:
        if dist.get_rank() == 0:
            print(f"DeepSpeed {version}: what speeds up {WRITTEN_FOR} is left out; the run is slower", file=sys.stderr)
        return
    one_pass_norm(engine.optimizer)
    step_by_blocks(engine.optimizer)
    engine.checkpoint_engine = StreamEngine()
    fewer_walks(engine)


# These two replace nothing that works, so they check what is there, not the version.


def compile_nothing() -> None:
    """Keeps DeepSpeed from compiling its shared-memory operation for CPUs, before the process group is made.

    That operation serves inference, and needs a compiler. If a run is killed meanwhile, torch leaves a lock file
    behind, for which every later run waits for ever (pytorch/pytorch#189245).
    """
    operations = getattr(deepspeed.ops, "__compatible_ops__", {})
    operations["deepspeed_shm_comm"] = False


def add_defaults(optimizer: Any) -> None:
    """Gives ZeRO's optimizer the `defaults` of the optimizer inside it, which it lacks and some schedules ask for
    (huggingface/accelerate#208)."""
    zero = getattr(optimizer, "optimizer", None)  # inside accelerate's own
    if zero is not None and not hasattr(zero, "defaults"):
        zero.defaults = zero.optimizer.defaults
