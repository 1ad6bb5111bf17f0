"""The base's own features of prompts: inputs of an MLP, from a pass that goes no further."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grow.checkpoint.switch_record import LOOKS_BACK, SwitchRecord
from grow.data.examples import all_learnt
from grow.data.packing import PackedDataset, collate
from grow.model.alpha import base_inside
from grow.model.layouts import decoder_mlps

_TOKENS = 2048  # of a batch


class _Read(Exception):
    """Ends a pass whose features have been read."""


@torch.no_grad()
def mlp_inputs(model: Any, prompts: Sequence[list[int]], layer: int, what: str = "reading") -> list[Tensor]:
    """Returns for each prompt the inputs of a layer's MLP in the model's base, fp32 [tokens, h], on the processor."""
    length = max(map(len, prompts))
    sequences = PackedDataset(all_learnt([[*prompt, 0] for prompt in prompts]), length, 0)
    seen: list[Tensor] = []

    def read(_: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Read

    found: dict[int, Tensor] = {}
    at_a_time = max(1, _TOKENS // length)
    handle = decoder_mlps(model)[layer].register_forward_pre_hook(read)
    try:
        with base_inside(model):
            for first in tqdm(range(0, len(sequences), at_a_time), desc=what, leave=False, disable=None):
                batch = collate([sequences[i] for i in range(first, min(first + at_a_time, len(sequences)))])
                ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
                with contextlib.suppress(_Read):
                    model(input_ids=ids, position_ids=positions, use_cache=False)
                x_BLH = seen.pop().float().cpu()
                for row in batch["rows"].unique().tolist():
                    if row >= 0:
                        found[row] = x_BLH[batch["rows"] == row]
    finally:
        handle.remove()
    return [found[row] for row in range(len(prompts))]


def looking_back(x_TH: Tensor, decay: float) -> Tensor:
    """Returns for each token the mean that a switch reads at it: of its own features and those of the tokens before,
    which weigh `decay` times what the next one does (SwitchRecord), [tokens, h]."""
    total, weight = x_TH.clone(), torch.ones(len(x_TH), 1)
    for back in range(1, min(LOOKS_BACK, len(x_TH)) if decay else 1):
        total[back:] += decay**back * x_TH[:-back]
        weight[back:] += decay**back
    return total / weight


def opens(model: Any, record: SwitchRecord, prompts: Sequence[list[int]]) -> list[bool]:
    """Returns what a switch decides for each prompt, read from the model's base."""
    found, weight_H = mlp_inputs(model, prompts, record.layer, "deciding"), torch.from_numpy(record.weight)
    return [bool(looking_back(x, record.decay)[-1] @ weight_H > record.threshold) for x in found]
