"""The norm of the gradients is taken in one pass over them.

DeepSpeed 0.19.8 copies each gradient to fp64 for its norm: 8 bytes a value of the largest tensor, on a GPU too, which
for an embedding of 262,144 rows of 2,560 is 5.4 GB.
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**18
"""Values that a processor sums in fp32; over 2^27 its one running sum is off by 2 %, over these by 1e-5."""


def one_pass_norm(optimizer: Any) -> None:
    """Makes a ZeRO optimizer take its norms in one pass, in place. A value that is not finite shows in the norm, by
    which ZeRO skips the step as before."""
    if not hasattr(optimizer, "get_grad_norm_direct"):
        return  # ZeRO-0
    combine = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        # One value stands for all: it has their norm. DeepSpeed marks the padding of a share, which does not count.
        own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        return combine([norm(own)[None]] if own else [], params[:1], norm_type)

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def norm(tensors: list[Tensor]) -> Tensor:
    """Returns the 2-norm of the values of tensors of any shapes and of one float type, in fp32: []."""
    blocks = [
        block
        for tensor in tensors
        for block in (tensor.detach().flatten().split(_BLOCK) if tensor.device.type == "cpu" else (tensor.detach(),))
    ]
    return torch.stack(torch._foreach_norm(blocks, 2, torch.float32)).norm()
