"""Compares a base and its growth with Liger's real kernels to what they compute without; in a process of its own, since
the kernels change classes.

    TRITON_INTERPRET=1 python -m tests.helpers.with_liger BASE GROWN

Triton's interpreter runs them without a GPU, one block after the other. It has none of CUDA's own functions, and gives
kernels Python's numbers, so both are stood in for here.
"""

import sys
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from grow.methods import METHODS
from grow.model.layouts import decoder_mlps, stock_class
from grow.model.loading import load
from grow.training.liger import use_liger
from tests.helpers.tiny import tokens


@triton.jit
def _rsqrt(x: Any) -> Any:
    return 1 / tl.sqrt(x)


@triton.jit
def _tanh(x: Any) -> Any:
    return 2 * tl.sigmoid(2 * x) - 1


class _Number(float):
    def to(self, _: Any) -> "_Number":
        return self


def _interpret() -> None:
    converted = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda given: _Number(given) if type(given) is float else converted(given)
    liger_kernel.ops.rms_norm.rsqrt, liger_kernel.ops.geglu.tanh = _rsqrt, _tanh


def _computed(path: str, method: str, liger: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of two packed rows, and the gradients of what trains; in fp32, since the interpreter cannot multiply
    in bf16."""
    model: Any = load(path, torch.float32)
    if liger:
        use_liger(model)
        assert all(stock_class(mlp).forward.__module__.startswith("liger") for mlp in decoder_mlps(model).values())
    METHODS[method]().prepare(model)
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    logits = model(input_ids=tokens(24), position_ids=positions, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


if __name__ == "__main__":
    _interpret()
    base, grown = sys.argv[1:]
    starts = {"sft": base, "g_freeze": grown, "g_train": grown}
    without, with_kernels = (
        {method: _computed(path, method, liger) for method, path in starts.items()} for liger in (False, True)
    )
    for method in starts:
        torch.testing.assert_close(with_kernels[method], without[method])
        assert torch.equal(with_kernels[method][0], with_kernels["sft"][0]), method
    print("as without")
