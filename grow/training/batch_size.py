"""`per_device_train_batch_size: auto`: the largest power of two whose forward and backward pass fit on every device.

Found at the start, with the model as it trains, in a micro-batch of sequences that are all labels; what DeepSpeed will
hold besides is set aside meanwhile. transformers' `auto_find_batch_size` starts the whole run again instead, and lets
the global batch grow smaller with it (accelerate's find_executable_batch_size); here the global batch is the recipe's.
"""

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from grow.checkpoint.shards import read_json
from grow.errors import UserError
from grow.model.attention import set_attention
from grow.model.head import Head, head_loss_sum, known_head
from grow.model.loading import checkpoint_activations, load
from grow.recipe import AUTO, Recipe
from grow.training.footprint import describe_run, largest_power
from grow.training.run_file import device_name, from_rank_0
from grow.training.same_run import NAME


def check_batch_size(recipe: Recipe) -> None:
    """Raises UserError for "auto" where it cannot be found: under ZeRO-3 a rank that runs out of memory leaves the
    others waiting for its share of the weights."""
    if recipe.per_device_train_batch_size == AUTO and recipe.zero.get("stage") == 3:
        raise UserError(
            "per_device_train_batch_size auto: not under ZeRO-3; give a number (grow plan RECIPE --gpu 80GB says which)"
        )


def with_batch_size(recipe: Recipe, run: Path, dtype: torch.dtype) -> Recipe:
    """Returns the recipe with a number of sequences in place of "auto": what the run began with, on devices of this
    name and as many ranks, or else what is found to fit. Every rank calls it.

    Raises UserError if not even one sequence fits.
    """
    if recipe.per_device_train_batch_size != AUTO:
        return recipe
    found = from_rank_0(lambda: _noted(run))
    if not found:
        found = _largest(recipe, dtype)
        if dist.get_rank() == 0:
            print(f"per_device_train_batch_size: {found} fit on {device_name()}", file=sys.stderr, flush=True)
    return dataclasses.replace(recipe, per_device_train_batch_size=found)


def _noted(run: Path) -> int:
    facts: dict[str, Any] = read_json(run / NAME) if (run / NAME).exists() else {}
    same = (facts.get("device"), facts.get("world_size")) == (device_name(), dist.get_world_size())
    return int(facts.get("per_device_train_batch_size", 0)) if same else 0


def _largest(recipe: Recipe, dtype: torch.dtype) -> int:
    """Tries one power of two after the other, the largest first, until one fits on all ranks."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    size = largest_power(recipe, dist.get_world_size())
    nothing = UserError(
        f"per_device_train_batch_size auto: not one sequence of max_length {recipe.max_length} fits on "
        f"{device_name()}; gradient_checkpointing, a higher ZeRO stage or fewer layers take less"
    )
    try:
        model, aside = _prepared(recipe, dtype, device)
        head = known_head(model)
    except torch.OutOfMemoryError:
        raise nothing from None
    try:
        while not _fits(model, head, recipe, size, device):
            if size == 1:
                raise nothing
            size //= 2
    finally:
        del model, aside
        gc.collect()
        clear_device_cache()
    return size


def _prepared(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Returns the model as it trains, and on a GPU memory as large as what DeepSpeed will hold besides."""
    model: Any = load(recipe.start, dtype).to(device).train()
    set_attention(model, recipe.attn_implementation)
    method = recipe.make_method()
    method.prepare(model)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    if device.type != "cuda" or "offload_optimizer" in recipe.zero:
        return model, None
    plan = describe_run(recipe, dist.get_world_size())
    stage = plan["stage"]
    optimizer = plan["stages"][str(stage)]["optimizer"] if stage else 12 * plan["trained_parameters"]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    besides = optimizer + plan["buckets_estimate"] + method.extra_bytes(shapes, dtype.itemsize)
    return model, torch.empty(besides, dtype=torch.uint8, device=device)


def _fits(model: Any, head: Head | None, recipe: Recipe, size: int, device: torch.device) -> bool:
    """Says whether a micro-batch's forward and backward pass fit, here and on all ranks."""
    fits = True
    try:
        # The text that a KL term is taken on is one sequence more.
        count = size + bool(getattr(recipe.make_method(), "kl_weight", 0))
        for _ in range(2):  # from the second micro-batch on, the gradients of the first lie there
            _pass(model, head, _batch(count, recipe.max_length, device))
    except Exception as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        fits = False
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    clear_device_cache()
    everywhere = torch.tensor(int(fits), device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere.item())


def _batch(count: int, length: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.zeros(count, length, dtype=torch.long, device=device)
    positions = torch.arange(length, device=device).expand(count, length)
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def _pass(model: Any, head: Head | None, batch: dict[str, Tensor]) -> None:
    head_loss_sum(model, head, batch).backward()
