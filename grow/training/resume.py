"""A run resumes from a checkpoint, on as many ranks as wrote it or on another number of them."""

import argparse
import contextlib
import copy
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grow.checkpoint.run_folder import set_aside
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import Fault, UserError, one_line
from grow.model.gather import gathered


def needs_universal(zero: ZeroCheckpoint) -> bool:
    """Says whether ZeRO's files were written by another number of ranks than there are."""
    return zero.stage > 0 and zero.world_size != dist.get_world_size()


def load_checkpoint(engine: Any, zero: ZeroCheckpoint, folder: Path) -> None:
    """Loads what trained and its optimizer's state into a DeepSpeed engine that has not trained yet.

    A checkpoint that `needs_universal` is converted to DeepSpeed's universal layout, in `RUN/checkpoint-N.universal`,
    which is removed when it is loaded; the engine's configuration then says "load_universal" (grow.training.arguments).
    Every rank calls it. Raises UserError if DeepSpeed cannot load it.
    """
    if needs_universal(zero):
        _load_universal(engine, zero, folder.with_name(f"{folder.name}.universal"))
    elif engine.load_checkpoint(str(folder), load_module_strict=False)[0] is None:
        raise UserError(f"{folder}: DeepSpeed cannot resume from it; remove it to go back one")


def _load_universal(engine: Any, zero: ZeroCheckpoint, out: Path) -> None:
    if dist.get_rank() == 0:
        print(f"{zero.path}: {zero.world_size} ranks wrote it, {dist.get_world_size()} resume", file=sys.stderr)
        _convert(zero.path, out)
    dist.barrier()
    decay = [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(out), tag="step")
    # ZeRO-3 gives every group of parameters the settings of the first, so that norms would decay like weights. It also
    # gives all of them one tensor as their count of steps, which Adam would advance once for each of them.
    for group, own in zip(engine.optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = own
    for state in engine.optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])
    check_loaded(engine.module, zero)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(out)


def _convert(tag_folder: Path, out: Path) -> None:
    """Writes the universal layout of one tag of a DeepSpeed checkpoint into OUT/step."""
    from deepspeed.checkpoint import ds_to_universal

    if out.is_dir() and {path.name for path in out.iterdir()} <= {"step", "latest_universal"}:
        shutil.rmtree(out)  # of an attempt that died here
    elif os.path.lexists(out):
        set_aside(out)
    # Without other processes: they would be forked from one that has threads, and a GPU.
    settings = argparse.Namespace(
        input_folder=str(tag_folder), output_folder=str(out / "step"), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            ds_to_universal.main(settings)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
            raise Fault(
                f"{out}: cannot be written ({one_line(error)[:200]}); it takes as much as {tag_folder}"
            ) from error


def check_loaded(model: nn.Module, zero: ZeroCheckpoint) -> None:
    """Compares every trained parameter with its master weights, rounded: DeepSpeed has resumed universal checkpoints
    with the weights of the start (deepspeedai/DeepSpeed#6691). Raises RuntimeError on every rank."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with gathered(parameter):
            expected = zero.trained[name].load().to(parameter.dtype)
            if not torch.equal(parameter.detach().cpu(), expected):
                raise RuntimeError(f"{name}: is not what {zero.path} holds after it was loaded")
