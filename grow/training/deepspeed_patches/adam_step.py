"""Adam steps over ZeRO's share of the weights, a block of values at a time.

DeepSpeed 0.19.8 (stage_1_and_2.py, step) lays all gradients end to end, copies them to fp32, scales them, updates the
master weights and copies those to the model's: five passes over memory and, with gradients in bf16, 6 bytes a value for
the two copies. With gradients in bf16 it also looks for values that are not finite first, in two passes more (the
default since deepspeedai/DeepSpeed#8035). Here each block goes all that way while it is in the cache, through one
buffer, and the norm shows whether a value is not finite.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

BLOCK = 2**20
"""Values that go through a processor at a time."""
GPU_BLOCK = 2**26
"""Values that go through a GPU at a time, which only many keep busy."""


def step_by_blocks(optimizer: Any) -> None:
    """Makes a ZeRO-1 or 2 optimizer step by blocks, in place. Other optimizers are left as they are, and so is one that
    is on the host, is not torch's AdamW, or has master weights in bf16 or a GradScaler. The state that ZeRO keeps and
    saves is unchanged."""
    if (
        type(optimizer) is not DeepSpeedZeroOptimizer
        or optimizer.cpu_offload
        or not optimizer.compute_grad_norm
        or optimizer.low_precision_master_weights_and_grads
        or optimizer.torch_autocast_gradscaler is not None
        or type(optimizer.optimizer) is not torch.optim.AdamW
        or any(group["amsgrad"] or group["maximize"] for group in optimizer.optimizer.param_groups)
    ):
        return
    whole_step = optimizer.step

    def step(closure: Any = None) -> None:
        norm = optimizer.scaled_global_norm()
        if not norm.isfinite() or norm < 0:  # DeepSpeed writes -1 for a norm that is not finite
            whole_step(closure)  # skips the step, or not, as its settings say
            return
        optimizer.micro_step_id, optimizer.overflow = INITIAL_MICRO_STEP_ID, False
        optimizer._global_grad_norm = norm / optimizer.loss_scale
        scale = torch.ones((), device=norm.device)
        optimizer.unscale_and_clip_grads([scale], norm)  # in place of all gradients
        optimizer._update_scale(False)
        for index in range(len(optimizer.bit16_groups)):
            _step_group(optimizer, index, scale)
        optimizer._lazy_init_hp_params_optimizer_state()
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
        for index in range(len(optimizer.bit16_groups)):
            optimizer._update_model_bit16_weights(index)

    optimizer.step = step


def _step_group(optimizer: Any, index: int, scale: Tensor) -> None:
    """Steps this rank's share of one group of parameters, which has settings of its own."""
    rank = torch.distributed.get_rank(optimizer.real_dp_process_group[index])
    master = optimizer.single_partition_of_fp32_groups[index]
    weights = optimizer.parallel_partitioned_bit16_groups[index][rank]
    group = optimizer.optimizer.param_groups[index]
    state = optimizer.optimizer.state[master]
    if not state:
        state["step"] = torch.zeros((), device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    optimizer.free_grad_in_param_list(optimizer.params_not_in_partition[index])
    steps = torch.as_tensor(state["step"], dtype=torch.float32).to(master.device)  # from a checkpoint: on the host
    buffer = torch.empty(min(BLOCK if master.is_cpu else GPU_BLOCK, master.numel()), device=master.device)
    for start, pieces in _blocks(optimizer, index, buffer.numel()):
        sizes = [piece.numel() for piece in pieces]
        scaled = buffer[: sum(sizes)]
        place = slice(start, start + scaled.numel())
        torch._foreach_copy_(scaled.split(sizes), pieces)
        scaled.mul_(scale)
        adamw(
            [master.data[place]],
            [scaled],
            [state["exp_avg"][place]],
            [state["exp_avg_sq"][place]],
            [],
            [steps.clone()],  # adamw counts it up
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        weights.data[place].copy_(master.data[place])
    state["step"] += 1
    optimizer.free_grad_in_param_list(optimizer.params_in_partition[index])
    optimizer._release_preflattened_grad_buffers(index)
    optimizer.averaged_gradients[index] = optimizer.all_grad_tensors[index] = None


def _blocks(optimizer: Any, index: int, size: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields this rank's share of the gradients in blocks of `size` values (the last may be smaller): the pieces that
    lie there end to end, and the place of the first. A block may hold hundreds of LoRA's gradients."""
    flat = optimizer._get_preflattened_grad_partition(index)
    start, pieces, room = 0, [], size
    for gradient in optimizer.averaged_gradients[index] if flat is None else [flat]:
        rest = gradient.flatten()
        while rest.numel():
            piece, rest = rest[:room], rest[room:]
            pieces.append(piece)
            room -= piece.numel()
            if not room:
                yield start, pieces
                start, pieces, room = start + size, [], size
    if pieces:
        yield start, pieces
