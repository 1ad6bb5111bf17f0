"""A training run goes from a recipe to a folder that says by itself what ran.

    RUN/run.json                     the resolved recipe, what it started from, versions
    RUN/checkpoint-N/                what trains, at step N, as DeepSpeed shards; COMPLETE in it when it is whole
    RUN/made.json                    what the method made before the first step, such as text that the base wrote
    RUN/logs/                        TensorBoard
    RUN/result/                      what the run ends in, where that is more than its last checkpoint
    RUN/COMPLETE                     written last: the run is done

Started again, a run resumes from its last complete checkpoint; a run that is done says so and does nothing.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from grow.checkpoint.run_folder import (
    MARKER,
    complete_checkpoints,
    final_checkpoint,
    find_corruption,
    losses_of,
    set_aside,
    step_of,
    write_marker,
)
from grow.checkpoint.shards import Checkpoint, read_json
from grow.checkpoint.zero import ZeroCheckpoint
from grow.data.of_recipe import tokenizer_of
from grow.data.packing import PackedDataset
from grow.errors import Preempted, UserError
from grow.model.attention import check_installed, set_attention
from grow.model.images import blank_for
from grow.model.loading import checkpoint_activations, load
from grow.model.memory import tune_malloc
from grow.model.switched import put_switch
from grow.names import canonical
from grow.parts import grown_words
from grow.plan import GrowthPlan
from grow.recipe import AUTO, Recipe
from grow.switch.of_recipe import switch_of
from grow.training.arguments import compute_type, training_arguments
from grow.training.batch_size import with_batch_size
from grow.training.callbacks import GracefulShutdown
from grow.training.check import check_run
from grow.training.compiling import check_compiler, compile_layers, compiles
from grow.training.deepspeed_patches import compile_nothing
from grow.training.liger import check_kernels, use_liger, uses_liger
from grow.training.quiet import hush_accumulation
from grow.training.resume import needs_universal
from grow.training.run_data import probe_of, read_data, shuffled, steps_of
from grow.training.run_file import Claim, device_name, first_day, from_rank_0, made_once, write_run_file
from grow.training.start import with_learning_rate
from grow.training.trainer import GrowTrainer, compare_frozen


def train(recipe: Recipe) -> dict[str, Any]:
    """Trains as the recipe says. Every rank calls it; ranks come from the environment (one if none are set).

    Raises UserError for mistakes of the user, Fault for failures, Preempted if the system preempted the run.
    """
    run = Path(recipe.output_dir)
    _take_device()
    recipe = with_learning_rate(recipe)
    start = check_run(recipe)
    if (run / MARKER).exists():
        return _done_already(run)
    check_installed(recipe.attn_implementation)
    check_compiler(recipe)
    check_kernels(recipe, str(start.config.get("model_type")))
    _single_process_defaults()
    tune_malloc()
    disable_progress_bar()  # of the weights that are loaded

    shutdown = GracefulShutdown()
    compile_nothing()
    hush_accumulation()
    deepspeed.init_distributed(verbose=False)
    claimed = Claim(run)
    from_rank_0(lambda: claimed.take() if run.is_dir() else None)
    if from_rank_0((run / MARKER).exists):  # by the process that had claimed it until now
        dist.destroy_process_group()
        return _done_already(run)
    checkpoint = from_rank_0(lambda: _sound_checkpoint(run))
    trainer = _trainer(recipe, claimed, start, shutdown, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not shutdown.preempted:
        result = _finish(trainer, run, start)
    dist.barrier()
    # Left to the interpreter's exit, ZeRO-3 processes abort in the destructors of the process group.
    dist.destroy_process_group()
    if shutdown.preempted:
        raise Preempted(
            f"{run}: preempted at step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint; "
            "run the same command again to resume"
        )
    return {"run": str(run), "status": "done", **result}


def _done_already(run: Path) -> dict[str, Any]:
    return {"run": str(run), "status": "was done already", **read_json(run / MARKER)}


def _take_device() -> None:
    """Makes this rank's GPU the current one before anything is put on a GPU; and flash attention's backward pass, if it
    is taken, one that gives the same bits each time."""
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    if torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(rank if rank < torch.cuda.device_count() else 0)  # a launcher may show each rank its own


def _trainer(recipe: Recipe, claimed: Claim, start: Checkpoint, shutdown: Any, checkpoint: Path | None) -> Any:
    """Returns a trainer with the model, as the method prepares it, and the data; writes run.json."""
    run = claimed.run
    recipe = recipe.on(from_rank_0(lambda: first_day(run)))
    tokenizer = tokenizer_of(recipe)
    data = read_data(recipe, start, tokenizer)
    sequences, validation = data["train"], data["validation"]
    steps = steps_of(recipe, sequences)
    # A run's first start makes its folder once nothing is wrong.
    if from_rank_0(lambda: claimed.take() and bool(complete_checkpoints(run))):
        raise UserError(f"{run}: another process has begun this run meanwhile; run the same command again to resume")
    # Fitted on rank 0 alone, with a base of its own: before ZeRO-3 partitions whatever is loaded.
    switch = from_rank_0(lambda: switch_of(recipe, start))
    method = recipe.make_method()
    method.made = from_rank_0(lambda: made_once(run, method, recipe))
    # Before the model is loaded: from_pretrained partitions it as it loads where the DeepSpeed config says ZeRO-3.
    dtype = compute_type(recipe)
    planned, recipe = recipe, with_batch_size(recipe, run, dtype)
    zero = None if checkpoint is None else ZeroCheckpoint(checkpoint)
    universal = zero is not None and needs_universal(zero)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run / "logs"))  # read by transformers as it begins
    args = training_arguments(recipe, steps, dtype, universal=universal, resumed=checkpoint is not None)
    set_seed(recipe.seed)
    probe = probe_of(recipe, tokenizer, run)
    model = load(recipe.start, dtype)
    # Tokens of one image see each other, which flash attention cannot.
    set_attention(model, "sdpa" if recipe.images and recipe.attn_implementation == AUTO else recipe.attn_implementation)
    if uses_liger(recipe, model.config.model_type):
        use_liger(model)
    method.prepare(model)
    if switch is not None:
        put_switch(model, switch)
    images = data["train"].examples.images
    if images is not None:
        blank_for(model, images.blank)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    if compiles(recipe):
        compile_layers(model)
    write_run_file(run, planned, start, data, str(dtype), model, switch, method.made, recipe.micro_batch)
    return GrowTrainer(
        model=model,
        args=args,
        recipe=recipe,
        method=method,
        sequences=shuffled(recipe, data, steps * recipe.train_batch_size),
        validation=validation,
        shutdown=shutdown,
        about=_about(recipe, model, sequences, steps, dtype),
        probe=probe,
        zero=zero,
    )


def _about(recipe: Recipe, model: Any, sequences: PackedDataset, steps: int, dtype: Any) -> str:
    """Describes a run in a line: method, parameters, ranks, device, data, steps."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    trained, all_of_them = sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)
    ranks = dist.get_world_size()
    how = model.config.get_text_config()._attn_implementation + ", compiled" * compiles(recipe)
    how += ", Liger" * uses_liger(recipe, model.config.model_type)
    plan = GrowthPlan.from_config({"growth": model.config.growth}) if recipe.method_class.grows else None
    grown = f"; grown: {grown_words(plan)}" if plan else ""
    return (
        f"{recipe.method}: trains {trained:,} of {all_of_them:,} parameters in {str(dtype).removeprefix('torch.')} on "
        f"{ranks} rank{'s' * (ranks > 1)} ({device_name()}, {how}); {len(sequences):,} sequences, "
        f"{sequences.examples.counts()[0]:,} tokens; {steps:,} steps of {recipe.train_batch_size}{grown}"
    )


def _finish(trainer: Any, run: Path, start: Checkpoint) -> dict[str, Any]:
    """Checks that the frozen parameters are unchanged, and writes the run's result, the marker last."""
    on_disk = {canonical(name): name for name in start.tensors}
    compared, changed = compare_frozen(trainer.model, on_disk, start.read)
    if changed:
        raise RuntimeError(f"{len(changed)} frozen parameters changed in training, {changed[0]} among them")
    result = _result(trainer, run) | {"frozen_unchanged": compared}
    if trainer.args.process_index == 0:
        if os.path.lexists(run / "result"):  # of an attempt that ended before its marker, or someone's own
            set_aside(run / "result")
        trainer.method.write_result(run, run / "result")
        write_marker(run / MARKER, json.dumps(result) + "\n")
    return result


def _result(trainer: Any, run: Path) -> dict[str, Any]:
    losses = losses_of(trainer.state.log_history)
    best = step_of(final_checkpoint(run)) if trainer.recipe.keep_best else 0
    kept = [loss for step, loss in losses if not best or step == best]
    return {
        "steps": trainer.state.global_step,
        **({"best_step": best} if best else {}),
        "validation_loss": kept[-1] if kept else None,
        **({"average": trainer.recipe.average} if trainer.recipe.average > 1 else {}),
    }


def _sound_checkpoint(run: Path) -> Path | None:
    """Returns the newest complete checkpoint that is not corrupted; reports those that are."""
    for checkpoint in complete_checkpoints(run):
        problem = find_corruption(checkpoint)
        if problem is None:
            return checkpoint
        print(f"{checkpoint}: {problem}; going back to the checkpoint before it", file=sys.stderr)
    return None


def _single_process_defaults() -> None:
    """Sets the environment that a launcher would have set, for a run of one process without one."""
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
