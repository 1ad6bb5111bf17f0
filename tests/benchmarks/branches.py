"""What the two branches of a grown MLP cost, beside one MLP of twice the width. Prints a table; tests nothing.

    python -m tests.benchmarks.branches [--sizes 270M,1B,4B] [--tokens 256,4096] [--repeat 20]

Both compute the same function with as many multiplications. The branches keep the base's weights as they are, and are
bit-identical to the base at step 0; one MLP would be neither. Forward, and forward with backward where only the
branch that was added trains (in the one MLP, which can freeze no half of a matrix, all of it).
"""

import statistics
import time
from collections.abc import Callable

import fire
import torch
from torch import nn
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

from grow.model.loading import compute_device, compute_dtype
from grow.model.mlp import grow_mlp
from tests.benchmarks.converter import words
from tests.benchmarks.training import device

SHAPES = {"270M": (640, 2048), "1B": (1152, 6912), "4B": (2560, 10240)}
"""hidden_size and intermediate_size."""


def mlp(hidden_size: int, intermediate_size: int) -> Gemma3MLP:
    return Gemma3MLP(Gemma3TextConfig(hidden_size=hidden_size, intermediate_size=intermediate_size))


def seconds(work: Callable[[], object]) -> float:
    """One call's; on a GPU, until it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_backward(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        module(x).sum().backward()
        module.zero_grad()
        x.grad = None

    return work


def forward(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def work() -> None:
        module(x)

    return work


def bench(sizes: str = "270M,1B,4B", tokens: str = "256,4096", repeat: int = 20) -> None:
    """Prints the table: medians of calls that are made in turn."""
    place, dtype = compute_device(), compute_dtype()
    print(f"{device()}, {dtype}\n\n| MLP of | tokens | what | one, ms | two branches ÷ one |\n|---|---|---|---|---|")
    for size in words(sizes):
        hidden_size, width = SHAPES[size]
        one, two = mlp(hidden_size, 2 * width), mlp(hidden_size, width)
        grow_mlp(two, 2)
        for module in (one, two):
            module.to(place, dtype)
        two.requires_grad_(False)
        two.grown.requires_grad_(True)
        for count in words(tokens):
            x = torch.randn(1, int(count), hidden_size, device=place, dtype=dtype, requires_grad=True)
            for what, kind in (("forward", forward), ("forward and backward", forward_backward)):
                calls = [kind(module, x) for module in (one, two)]
                times = [[seconds(call) for call in calls] for _ in range(repeat + 3)][3:]
                whole, branches = (statistics.median(column) for column in zip(*times, strict=True))
                print(f"| {size} | {count} | {what} | {whole * 1e3:.2f} | {branches / whole:.2f} |", flush=True)


if __name__ == "__main__":
    fire.Fire(bench)
