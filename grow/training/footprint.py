"""The resources of a run: bytes on each GPU, and sent by it each step, for each ZeRO stage; on disk; seconds to leave.

Shapes come from the headers of the checkpoint that training starts from, and from the method; nothing is loaded. The
accounting is that of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3) for mixed precision with Adam, where
only T of P parameters train: c bytes a weight and a gradient, 12 a trained parameter for master, mean and variance.
Bytes sent follow what DeepSpeed 0.19.8 does, which is not always what the paper says (`collectives`).
"""

import re
from math import ceil, gcd, prod
from operator import floordiv
from typing import Any

from grow.checkpoint.copies import added_tensors
from grow.checkpoint.growable import make_plan
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.starting import second_head
from grow.errors import UserError
from grow.model.head import PIECE
from grow.model.images import sides
from grow.names import DOWN, LAYERS, MATRICES, VISION, canonical, layer_of, matrix_of, of_language_model
from grow.parts import grown_words
from grow.plan import GrowthPlan, setting, text_config
from grow.recipe import Recipe
from grow.training.start import planned_start

DISK_RATE = 0.5e9
"""The assumed rate of writing a checkpoint and reading it back, bytes a second, on a shared file system."""
PERSISTENCE_THRESHOLD = 100_000
"""Parameters of at most so many values stay whole on every rank in ZeRO-3, unless its JSON says otherwise."""
REUSE_DISTANCE = 1_000_000_000
"""ZeRO-3 keeps a gathered parameter that is used again within so many values (stage3_max_reuse_distance)."""
REDUCE_BUCKET = 500_000_000
"""Values in the buffer that gradients are reduced from, unless the JSON's reduce_bucket_size says otherwise."""

RESERVED = 0.94, 1_000_000_000
"""Of a GPU's memory, the share that torch's allocator can be expected to fill, and the bytes that the driver, its
libraries and NCCL take."""
SOFT_TOKENS = 280
"""Tokens of an image, at most, as Gemma 4's processor makes them by default; each is a square of patches."""

Shapes = dict[str, tuple[int, ...]]


def describe_run(recipe: Recipe, world_size: int, gpu: int = 0) -> dict[str, Any]:
    """Returns the result of `plan` for a recipe on a number of GPUs: bytes, parameters, seconds; and, where a GPU's
    memory is given in bytes, the largest per_device_train_batch_size that fits under each ZeRO stage, 0 for none.

    Raises UserError if there is no checkpoint to start from, or no GPU.
    """
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: at least 1 is needed")
    if gpu and recipe.train_batch_size % world_size:
        raise UserError(f"train_batch_size {recipe.train_batch_size} is not a multiple of {world_size} ranks")
    start = planned_start(recipe)
    method, width = recipe.make_method(), 4 if recipe.dtype == "float32" else 2
    method.check_names(start.tensors)
    shapes = model_shapes(start)
    plan = GrowthPlan.from_config(start.config)
    if recipe.makes_grown and plan is None:
        plan = make_plan(start, **recipe.growth)
        shapes |= {name: tensor.shape for name, tensor in added_tensors(start, plan).items()}
    shapes |= method.added_shapes(shapes)
    trained = {name: shape for name, shape in shapes.items() if method.trains(name)}
    zero = recipe.zero
    # Beside the optimizer's part ZeRO-1 and 2 save the weights; in ZeRO-3 no rank has them.
    checkpoint = count(trained) * (12 if zero.get("stage") == 3 else 12 + width)
    whole = persistence(recipe)
    stages = {str(stage): model_states(stage, shapes, trained, world_size, width, whole) for stage in (1, 2, 3)}
    micro_batches = ceil(recipe.train_batch_size / (world_size * recipe.micro_batch))
    moved = {stage: collectives(int(stage), shapes, trained, micro_batches, width, recipe) for stage in stages}
    for states in stages.values():
        states["weights"] += method.extra_bytes(shapes, width)
    stages["3 with CPU offload"] = offloaded(stages["3"])
    buckets = int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * width

    def activations_of(sequences: int, stage: str) -> int:
        return activations(recipe, start, shapes, trained, width, sequences, whole_logits=stage.startswith("3"))

    fitting = {}
    for stage, states in stages.items() if gpu else ():
        taken = min(buckets, count(trained) * width) + sum(states[p] for p in ("weights", "gradients", "optimizer"))
        room = int(gpu * RESERVED[0]) - RESERVED[1] - taken
        fitting[stage] = largest_power(recipe, world_size)
        while fitting[stage] and activations_of(fitting[stage], stage) > room:
            fitting[stage] //= 2
    return {
        "method": recipe.method,
        **({"grown": grown_words(plan)} if plan else {}),
        "world_size": world_size,
        "micro_batches": micro_batches,
        "stage": zero.get("stage", 0),
        "dtype": "float32" if width == 4 else "bfloat16",
        "parameters": count(shapes),
        "trained_parameters": count(trained),
        "stages": stages,
        "moved": {stage: bytes_ | {"sent": sent(bytes_, world_size)} for stage, bytes_ in moved.items()},
        "buckets_estimate": buckets,
        "activations_estimate": activations_of(recipe.micro_batch, str(zero.get("stage", 0))),
        **({"gpu_bytes": gpu, "largest_micro_batch": fitting} if gpu else {}),
        "checkpoint_bytes": checkpoint,
        "disk_bytes": checkpoint * (recipe.kept_checkpoints + 1),
        "disk_rate": DISK_RATE,
        "lead_seconds": ceil(checkpoint / DISK_RATE),
    }


def model_shapes(start: Checkpoint) -> Shapes:
    """Returns the shapes of a checkpoint's parameters, without a tied head, which is the embedding's second name."""
    head, _ = second_head(start) or (None, None)
    return {name: info.shape for name, info in start.tensors.items() if name != head}


def count(shapes: Shapes) -> int:
    """Returns the number of values."""
    return sum(prod(shape) for shape in shapes.values())


def model_states(
    stage: int, shapes: Shapes, trained: Shapes, world_size: int, width: int, persistent: int
) -> dict[str, int]:
    """Returns the bytes on each rank under a ZeRO stage, for weights and gradients of `width` bytes a value.

    ZeRO-1 accumulates all gradients on every rank, ZeRO-2 and 3 this rank's share. ZeRO-3 keeps small parameters whole
    beside the share of them, once they have been used.
    """
    weights = count(shapes) * width
    if stage == 3:
        sizes = [prod(shape) for shape in shapes.values()]
        weights = sum(ceil(size / world_size) + (size if size <= persistent else 0) for size in sizes) * width
    share = ceil(count(trained) / world_size)
    gradients = (count(trained) if stage == 1 else share) * width
    return {"weights": weights, "gradients": gradients, "optimizer": 12 * share}


def offloaded(states: dict[str, int]) -> dict[str, int]:
    """Returns the same bytes with the optimizer on the host, which then holds the gradients' share too."""
    return {
        "weights": states["weights"], "gradients": 0, "optimizer": 0,
        "host": states["gradients"] + states["optimizer"],
    }  # fmt: skip


def collectives(
    stage: int, shapes: Shapes, trained: Shapes, micro_batches: int, width: int, recipe: Recipe
) -> dict[str, int]:
    """Returns the bytes of the whole tensors in each collective of an optimizer step, as DeepSpeed 0.19.8 runs them.

    For an all-gather that is its output, for the others their input. The few bytes of losses, norms and flags are left
    out. Validation and checkpoints come on top.

    - ZeRO-1: all-reduce of the T gradients, once a step.
    - ZeRO-2: the same for every micro-batch, since no rank keeps whole gradients to accumulate in. It is an all-reduce
      too, of which each rank keeps its share, so ZeRO-2 saves memory and no traffic. (stage_1_and_2.py, average_tensor:
      with reduce_scatter on it would be one as well, use_multi_rank_bucket_allreduce, and take three passes over the
      gradients more.)
    - Both: all-gather of the T new weights, once a step (utils.py, all_gather_into_tensor_dp_groups).
    - ZeRO-3, every micro-batch: reduce-scatter of the T gradients (stage3.py, __avg_scatter_grads), and all-gather of
      all weights that are used, trained or not (`gathered_values`). Once a step, all-gather of those that stay whole.
    """
    size = count(trained) * width
    if stage < 3:
        return {"all_reduce": size * (micro_batches if stage == 2 else 1), "reduce_scatter": 0, "all_gather": size}
    values = micro_batches * gathered_values(shapes, trained, recipe) + sum(
        prod(shape) for shape in shapes.values() if prod(shape) <= persistence(recipe)
    )
    return {"all_reduce": 0, "reduce_scatter": size * micro_batches, "all_gather": values * width}


def gathered_values(shapes: Shapes, trained: Shapes, recipe: Recipe) -> int:
    """Returns how many values ZeRO-3 gathers on every rank for a micro-batch.

    Forward: each parameter that is not small, except those of a tower, which text does not use; a tied embedding
    once more for the head, unless the head is so near that it is kept. Backward: the head, everything in the layers
    above the lowest that trains, and in that one what trains. gradient_checkpointing gathers those layers once more,
    for their second forward pass, after which what trains is kept for the backward pass. Prefetching, which spares a
    little, is not counted.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items() if recipe.images or of_language_model(name)}
    sizes = {name: size for name, size in sizes.items() if size > persistence(recipe)}
    layers = {name: size for name, size in sizes.items() if _layer(name) >= 0}
    lowest = _lowest(trained)
    above = sum(size for name, size in layers.items() if _layer(name) > lowest or name in trained)
    if recipe.gradient_checkpointing:
        above += sum(size for name, size in layers.items() if _layer(name) >= lowest and name not in trained)
    heads = [size for name, size in sizes.items() if canonical(name) == "lm_head.weight"]
    again = 0
    if not heads:
        heads = [size for name, size in sizes.items() if canonical(name) == "embed_tokens.weight"]
        near = sum(layers.values()) < _setting(recipe, "stage3_max_reuse_distance", REUSE_DISTANCE)
        again = 0 if near else sum(heads)
    return sum(sizes.values()) + again + sum(heads) + above


def sent(moved: dict[str, int], world_size: int) -> int:
    """Returns the bytes that a rank sends in ring collectives: (N - 1) / N of the tensor, twice that for an all-reduce.

    (Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".)
    """
    whole = 2 * moved["all_reduce"] + moved["reduce_scatter"] + moved["all_gather"]
    return whole * (world_size - 1) // world_size


def persistence(recipe: Recipe) -> int:
    """Returns the size up to which a parameter stays whole on every rank in ZeRO-3, in values."""
    return _setting(recipe, "stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)


def _setting(recipe: Recipe, name: str, default: int) -> int:
    """Returns a number of the DeepSpeed JSON; DeepSpeed's default for "auto", which depends on the model."""
    value = recipe.zero.get(name)
    return int(value) if isinstance(value, int | float) else default


def largest_power(recipe: Recipe, world_size: int) -> int:
    """Returns the largest power of two of which the global batch is a multiple on so many ranks."""
    return gcd(recipe.train_batch_size // world_size, 2**30)


def activations(
    recipe: Recipe, start: Checkpoint, shapes: Shapes, trained: Shapes, width: int, sequences: int, whole_logits: bool
) -> int:
    """Estimates the bytes that a micro-batch of so many sequences leaves for the backward pass.

    A gated block with fused attention saves some 12 hidden, 4 intermediate and 2 attention widths a token. All layers
    from the lowest trained on do so; with gradient_checkpointing one of them at a time does, and all keep their inputs.
    Logits and their gradient are there in `width` bytes, for as many labels as there are tokens: a piece of them at a
    time (grow.model.head), or all of them (ZeRO-3).
    """
    text = text_config(start.config)
    tokens = sequences * recipe.max_length
    hidden = setting(text, "hidden_size") or 0
    widths: dict[int, int] = {}
    for name, shape in shapes.items():
        matrix = matrix_of(name)
        layer, kept = _layer(name), "self_attn." in name or (matrix in MATRICES and matrix not in DOWN)
        if layer >= 0 and len(shape) == 2 and kept:
            widths[layer] = widths.get(layer, 12 * hidden) + 2 * shape[0]
    lowest = _lowest(trained)
    saving = [size for layer, size in widths.items() if layer >= lowest]
    saved = len(saving) * hidden + max(saving, default=0) if recipe.gradient_checkpointing else sum(saving)
    vocabulary = int(text.get("vocab_size", 0))
    logits = tokens * vocabulary * width
    beside = sequences * tower_activations(recipe, start.config.get("vision_config") or {}, shapes, trained) * width
    if whole_logits:
        return tokens * saved * width + 2 * logits + beside
    # The gradient of a head that trains is there until the backward pass, in fp32 if it is summed up of pieces.
    heads = any(canonical(name) in ("lm_head.weight", "embed_tokens.weight") for name in trained)
    head = vocabulary * hidden * (4 if logits > PIECE else width) * heads
    return tokens * saved * width + 2 * min(logits, PIECE + tokens * hidden * width) + head + beside


def tower_activations(recipe: Recipe, config: dict[str, Any], shapes: Shapes, trained: Shapes) -> int:
    """Estimates the values that the tower for images leaves for the backward pass of one image, as `activations` does
    for the language model; `config` is the tower's."""
    layers = {name: int(match[1]) for name in shapes if (match := re.search(rf"{VISION}\..*{LAYERS}\.(\d+)\.", name))}
    training = [layer for name, layer in layers.items() if name in trained]
    if not recipe.images or not training:
        return 0
    hidden, patches = config.get("hidden_size", 0), SOFT_TOKENS * config.get("pooling_kernel_size", 0) ** 2
    if "image_size" in config:
        patches = prod(map(floordiv, sides(config["image_size"]), sides(config.get("patch_size", 1))))
    widths: dict[int, int] = {}
    for name, layer in layers.items():
        matrix = matrix_of(name)
        if layer >= min(training) and matrix in MATRICES and matrix not in DOWN and len(shapes[name]) == 2:
            widths[layer] = widths.get(layer, 16 * hidden) + 2 * shapes[name][0]
    saved = len(widths) * hidden + max(widths.values()) if recipe.gradient_checkpointing else sum(widths.values())
    return patches * saved


def _lowest(trained: Shapes) -> int:
    """Returns the lowest layer that trains; -1 if something below the layers does."""
    return min(map(_layer, trained), default=-1)


def _layer(name: str) -> int:
    """Returns the decoder layer that a parameter belongs to; -1 if it belongs to none."""
    layer = layer_of(name)
    return -1 if layer is None else layer
