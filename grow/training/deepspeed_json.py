"""A recipe's DeepSpeed JSON is read, compared with what a recipe decides, and completed.

The file says how the work is shared out over ranks. The recipe decides what is computed: the batch, the rates, the
clipping, the precision. DeepSpeed ignores a misspelt name silently, and some of its settings change the layout of
checkpoints; so only names that are known here to be harmless are accepted.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grow.errors import UserError, unknown
from grow.recipe_values import read_deepspeed, zero_settings

FROM_RECIPE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 0},
    # Else accelerate replaces torch's Adam by DeepSpeed's own, which has to be compiled.
    "zero_force_ds_cpu_optimizer": False,
}
"""The values of settings that are not in the file: DeepSpeed's own defaults would contradict the recipe, such as no
clipping."""

_RECIPE_DECIDES = {
    "optimizer": "learning_rate, weight_decay, adam_beta1, adam_beta2 and adam_epsilon",
    "scheduler": "lr_scheduler_type and warmup_steps",
    "amp": "dtype",
    "torch_autocast": "dtype",
    "activation_checkpointing": "gradient_checkpointing",
}
_SHOWN = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
}  # fmt: skip
_SETTINGS = {*FROM_RECIPE, *_SHOWN, "fp16", "data_types", "communication_data_type", "zero_allow_untested_optimizer"}
_OF_STAGE_3 = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)  # fmt: skip
_PARTS: dict[str, set[str]] = {
    "zero_optimization": {
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "offload_param",
        "offload_optimizer", "sub_group_size", "ignore_unused_parameters", "memory_efficient_linear",
        "log_trace_cache_warnings", "compute_grad_norm", *(f"stage3_{name}" for name in _OF_STAGE_3),
    },
    "zero_optimization.offload_optimizer": {"device", "pin_memory", "buffer_count", "fast_init", "ratio"},
    "zero_optimization.offload_param": {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"},
    "bf16": {"enabled", "check_grad_overflow"},
    "data_types": {"grad_accum_dtype"},
}  # fmt: skip


def complete_deepspeed(path: str | Path) -> dict[str, Any]:
    """Returns the settings for DeepSpeed: the file's, and "auto", the recipe's value, for those that it leaves out.

    Raises UserError for a setting that contradicts the recipe, that is not known, or whose checkpoints could not be
    read again.
    """
    stage = zero_settings(path).get("stage", 0)
    given = {name: value for name, value in read_deepspeed(path).items() if value is not None}
    _check_names(path, "", given, _SETTINGS)
    for part, names in _PARTS.items():
        _check_names(path, f"{part}.", _part(path, given, part), names)
    if _is_on(given.get("fp16")):
        raise UserError(f"{path}: fp16 is on, and Gemma 3 overflows in it; take it out: the recipe's dtype decides")
    _check_values(path, given, stage)
    return completed(given)


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's settings, and the recipe's for those that it leaves out."""
    settings = FROM_RECIPE | {name: value for name, value in given.items() if value is not None}
    for part in ("bf16", "zero_optimization"):
        settings[part] = FROM_RECIPE[part] | settings[part]
    return settings


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Returns the name of a setting in which two files differ, except settings that only affect logging; None if there
    is none."""
    first, second = completed(one), completed(other)
    names = sorted((first.keys() | second.keys()) - _SHOWN)
    return next((name for name in names if first.get(name) != second.get(name)), None)


def _part(path: str | Path, given: Mapping[str, Any], part: str) -> dict[str, Any]:
    values: Any = given
    for name in part.split("."):
        values = values.get(name)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise UserError(f"{path}: {part} is {values!r}; it is an object, {{…}}")
    return values


def _check_names(path: str | Path, place: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    for name, value in values.items():
        if name in names or not _is_on(value):
            continue  # DeepSpeed itself refuses a name inside a part that it does not know
        if not place and name in _RECIPE_DECIDES:
            raise UserError(f"{path}: {name}: the recipe decides that ({_RECIPE_DECIDES[name]}); take it out")
        raise UserError(f"{path}: {place}{unknown(name, sorted(names), 'setting that a run takes')}")


def _is_on(value: Any) -> bool:
    """Says whether a setting does anything: one that is false, null, or an object that is not enabled does not."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) not in (False, "auto")
    return value is not None and value is not False


def _check_values(path: str | Path, given: dict[str, Any], stage: int) -> None:
    for part in ("offload_optimizer", "offload_param"):
        offload = _part(path, given, f"zero_optimization.{part}")
        if offload.get("device", "none") not in ("none", "cpu") or offload.get("ratio", 1) != 1:
            raise UserError(
                f"{path}: zero_optimization.{part}: only the device cpu, for all of it, can be resumed from"
            )
    if not _part(path, given, "zero_optimization").get("compute_grad_norm", True):
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm: max_grad_norm of the recipe needs it; take it out"
        )
    accumulation = _part(path, given, "data_types").get("grad_accum_dtype")
    if accumulation is not None and (accumulation != "fp32" or stage not in (2, 3)):
        raise UserError(
            f"{path}: data_types.grad_accum_dtype {accumulation!r} in ZeRO-{stage}: gradients can be accumulated in "
            "fp32 in ZeRO-2 and ZeRO-3; other checkpoints could not be resumed from"
        )
