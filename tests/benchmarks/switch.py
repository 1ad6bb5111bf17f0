"""What a switch costs, beside the base and the grown model without one. Prints a table; tests nothing.

    python -m tests.benchmarks.switch BASE [--layers upper,all,queries] [--batch 4] [--tokens 128] [--repeat 9]

A forward pass over a batch of prompts, whose rows are all off, all on, or half of each; and 16 tokens of generation
after them. With the MLPs, or the query heads, of all layers grown a first pass of the base, up to a third of the depth,
decides.
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import fire
import numpy as np
import torch

import grow
from grow.checkpoint.switch_record import SwitchRecord
from grow.model.layouts import decoder_mlps
from grow.model.loading import compute_device, compute_dtype, load
from grow.model.switched import put_switch
from tests.benchmarks.branches import seconds
from tests.benchmarks.converter import words
from tests.benchmarks.training import device


def with_switch(model: Any, ids: torch.Tensor, layer: int, share: float) -> Any:
    """A grown model whose switch is on for this share of the rows."""
    seen: list[torch.Tensor] = []
    handle = decoder_mlps(model)[layer].register_forward_pre_hook(lambda _, x: seen.append(x[0][:, -1].float()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    weight = np.zeros(seen[0].shape[1], np.float32)
    weight[0] = 1.0
    scores = seen[0][:, 0].sort().values.tolist()
    bounds = [scores[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(scores)), scores[-1] + 1]
    put_switch(model, SwitchRecord("row", layer, weight, bounds[round((1 - share) * len(scores))]))
    return model


def bench(base: str, layers: str = "upper,all,queries", batch: int = 4, tokens: int = 128, repeat: int = 9) -> None:
    """Prints the table: medians of calls that are made in turn."""
    place = compute_device()
    ids = torch.randint(1000, 20_000, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(place)

    def fresh(grown: str = "") -> Any:
        model = load(base, compute_dtype()).to(place)
        if grown == "queries":
            return grow.grow_model(model, layers="none", attention="queries").to(place)
        return grow.grow_model(model, layers=grown).to(place) if grown else model

    print(f"{device()}, {compute_dtype()}; {batch} prompts of {tokens} tokens\n")
    print("| layers | model | forward, tokens/s | time ÷ base | ÷ grown | generating, tokens/s | time ÷ base |")
    print("|---|---|---|---|---|---|---|")
    for grown in words(layers):
        third = -(-len(decoder_mlps(fresh())) // 3)
        models = {"base": fresh(), "grown, no switch": fresh(grown)}
        for name, share in (("all off", 0.0), ("half on", 0.5), ("all on", 1.0)):
            models[f"switch, {name}"] = with_switch(fresh(grown), ids, third, share)
        passes, written = {name: [] for name in models}, {name: [] for name in models}
        for _ in range(repeat):
            for name, model in models.items():
                passes[name].append(seconds(forward(model, ids)))
                written[name].append(seconds(generation(model, ids)))
        medians, longer = ({n: statistics.median(t[1:]) for n, t in times.items()} for times in (passes, written))
        for name, time in medians.items():
            print(
                f"| {grown} | {name} | {ids.numel() / time:,.0f} | {time / medians['base']:.2f} | "
                f"{time / medians['grown, no switch']:.2f} | {16 * batch / longer[name]:,.1f} | "
                f"{longer[name] / longer['base']:.2f} |"
            )


def forward(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def work() -> None:
        model(ids, logits_to_keep=1)

    return work


def generation(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)

    return work


if __name__ == "__main__":
    fire.Fire(bench)
