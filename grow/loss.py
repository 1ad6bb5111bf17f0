"""Logits only where there is a label.

Gemma's vocabulary head is 262,144 wide, most of a small model's work; prompts and padding need none of it. Shape
suffixes: B sequences, L tokens, H hidden size, N labelled positions, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grow.tasks import IGNORED

_AT_A_TIME = 256
"""Positions whose distributions over the vocabulary are in memory at once, in fp32, where no gradient needs them."""


def labelled_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Runs the model, of any class and under any wrapper, on packed sequences.

    `batch` holds input_ids, position_ids and labels, [B, L] int64 each (grow.tasks). Returns logits [N, V] in the
    model's dtype and labels [N], in the order of the labels. The head is given hidden states [N, H]: a 2-D input,
    since torch copies a frozen head's weight for every batch row of a strided 3-D one.
    """
    labels_BL = batch["labels"]
    mask_BL = labels_BL != IGNORED
    unwrapped: Any = getattr(model, "module", model)
    head = unwrapped.get_output_embeddings()

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][mask_BL], *inputs[1:])

    handle: Any = head.register_forward_pre_hook(select)
    try:
        # Packed rows stay apart only without an attention mask and without a cache.
        output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        handle.remove()
    return output.logits, labels_BL[mask_BL]


def loss_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over labels, each times its weight, in fp32: logits [N, V], labels and weights [N] → []."""
    if weights is None:
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none") @ weights


@torch.no_grad()
def token_scores(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For each label: its log-probability in nats, whether it is the likeliest token, its row; [N] each."""
    logits, labels = labelled_logits(model, batch)
    parts = zip(logits.split(_AT_A_TIME), labels.split(_AT_A_TIME), strict=True)
    logprobs = torch.cat([-nn.functional.cross_entropy(part.float(), own, reduction="none") for part, own in parts])
    return logprobs, logits.argmax(dim=-1) == labels, batch["rows"][batch["labels"] != IGNORED]
