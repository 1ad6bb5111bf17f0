"""A model's head and its loss in pieces, so that the logits of a micro-batch are never whole in memory.

A head of 262,144 tokens makes half a MB of logits of each label in bf16, and a gradient as large. Here the hidden
states at labels go through it some at a time, and what stays is their gradient. Shape suffixes: N labelled positions, H
hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grow.model.loss import label_scores, labelled, labelled_logits, loss_and_gradient, loss_sum, token_scores
from grow.model.wrapped import unwrapped

PIECE = 2**28
"""Bytes of logits at a time: some 500 labels of Gemma's vocabulary in bf16, enough for a product at full speed."""


class Head:
    """Computes logits as a model's class does: its linear layer, the scale of Cohere's and Granite's, and Gemma's soft
    cap."""

    def __init__(self, model: Any):
        config = model.config.get_text_config()
        self.layer: Any = model.get_output_embeddings()
        self.scale = float(getattr(config, "logit_scale", None) or 1)
        self.divisor = float(getattr(config, "logits_scaling", None) or 1)
        self.cap = float(getattr(config, "final_logit_softcapping", None) or 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps hidden states […, H] to logits […, V]."""
        found: Tensor = self.layer(hidden)
        found = found * self.scale if self.scale != 1 else found
        found = found / self.divisor if self.divisor != 1 else found
        return torch.tanh(found / self.cap) * self.cap if self.cap else found

    def slope(self, logits: Tensor) -> Tensor | float:
        """Returns the derivative of logits by what the layer gave, elementwise."""
        scale = self.scale / self.divisor
        return scale * (1 - (logits / self.cap).square()) if self.cap else scale

    def pieces(self, hidden: Tensor) -> list[slice]:
        """Returns the positions that go through the layer together."""
        size = max(1, PIECE // (hidden.element_size() * self.layer.weight.shape[0]))
        return [slice(first, first + size) for first in range(0, len(hidden), size)]


def known_head(model: nn.Module) -> Head | None:
    """Returns the head of a model; None where its logits are not what Head computes, bit for bit on some tokens, or
    where its weights are partitioned (ZeRO-3) or not those of one linear layer."""
    own = unwrapped(model)
    layer = own.get_output_embeddings()
    if type(layer) is not nn.Linear or layer.bias is not None or hasattr(layer.weight, "ds_id"):
        return None
    head, seen, was = Head(own), list[Tensor](), own.training
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own.eval()
            # Past the special tokens, which stand first in most vocabularies: none begins a row here.
            ids = torch.arange(16, 24, device=layer.weight.device)[None] % layer.weight.shape[0]
            logits = own(input_ids=ids, use_cache=False).logits
            same = len(seen) == 1 and torch.equal(head.logits(seen[0]), logits)
    finally:
        handle.remove()
        own.train(was)
    return head if same else None


def head_loss_sum(
    model: nn.Module, head: Head | None, batch: dict[str, Tensor], weights: Tensor | None = None
) -> Tensor:
    """Returns the cross-entropy summed over a batch's labels, []: in pieces, or of whole logits where no head is known
    (grow.model.loss.loss_sum)."""
    if head is None:
        return loss_sum(*labelled_logits(model, batch), weights)
    hidden, labels = _hidden(model, head, batch)
    given = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
    total: Tensor = _HeadLoss.apply(hidden, head.layer.weight, head, labels, given)
    return total


@torch.no_grad()
def head_scores(model: nn.Module, head: Head | None, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns each label's log-probability in nats, fp32, and whether it is the likeliest token; [N] each."""
    if head is None:
        return token_scores(model, batch)[:2]
    hidden, labels = _hidden(model, head, batch)
    found = [label_scores(head.logits(hidden[piece]), labels[piece]) for piece in head.pieces(hidden)]
    if not found:
        return torch.zeros_like(labels, dtype=torch.float32), torch.zeros_like(labels, dtype=torch.bool)
    likelihoods, hits = zip(*found, strict=True)
    return torch.cat(likelihoods), torch.cat(hits)


def _hidden(model: nn.Module, head: Head, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Runs the model up to its head. Returns the hidden states at labels [N, H], and the labels [N]."""
    kept: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        kept.append(states)
        return states[:0]  # so that the head itself has nothing to do

    _, labels = labelled(model, batch, keep)
    return kept[0], labels


class _HeadLoss(torch.autograd.Function):
    """Computes the summed loss, and in the forward pass the gradients of the hidden states and, if it trains, of the
    head's weight. Several pieces of the latter are summed up in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, head: Head, labels: Tensor, weights: Tensor) -> Tensor:
        down = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        pieces = head.pieces(hidden)
        exact = torch.float32 if len(pieces) > 1 else weight.dtype
        own = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        wanted = down is not None or own is not None
        total = hidden.new_zeros((), dtype=torch.float32)
        for piece in pieces:
            logits = head.logits(hidden[piece])
            slope = head.slope(logits)
            loss, gradient = loss_and_gradient(logits, labels[piece], weights[piece], wanted)
            total += loss
            if gradient is None:
                continue
            gradient = gradient.mul_(slope)
            if down is not None:
                down[piece] = gradient @ weight
            if own is not None:
                own += gradient.T @ hidden[piece]
        ctx.save_for_backward(down, None if own is None else own.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        down, own = ctx.saved_tensors
        return None if down is None else down.mul_(scale), None if own is None else own.mul_(scale), None, None, None
