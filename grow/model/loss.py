"""Computes logits only where there is a label, and losses from them.

Gemma's vocabulary head is 262,144 wide, most of a small model's work; prompts and padding do not need it. Shape
suffixes: B sequences, L tokens, H hidden size, N labelled positions, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grow.data.labels import IGNORED
from grow.model.alpha import base_inside
from grow.model.attention import laid_end_to_end
from grow.model.images import of_images, passing_the_tower
from grow.model.wrapped import unwrapped

_GPU_BYTES, _CORE_BYTES = 2**28, 2**21
"""Bytes of distributions over the vocabulary that are in memory at once in fp32: on a GPU enough for few kernels; on a
processor what stays in each core's cache, which takes half the time or less."""


def labelled_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Runs the model, of any class and under any wrapper, on packed sequences.

    `batch` holds input_ids, position_ids and labels, [B, L] int64 each, and tensors of images if it has some
    (grow.data.packing). Returns logits [N, V] in the model's dtype and labels [N], in the order of the labels.
    """
    return labelled(model, batch, lambda states: states)


def labelled(model: nn.Module, batch: dict[str, Tensor], seen: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Runs the model as labelled_logits does. `seen` is given the hidden states at labels [N, H], and returns those
    that go through the head: a 2-D input, since torch copies a frozen head's weight for every batch row of a strided
    3-D one."""
    own = unwrapped(model)
    batch, of_rows = laid_end_to_end(own, batch)
    labels_BL = batch["labels"]
    mask_BL = labels_BL != IGNORED
    head = own.get_output_embeddings()

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (seen(inputs[0][mask_BL]), *inputs[1:])

    handle: Any = head.register_forward_pre_hook(select)
    deciding = own.switch.of_batch(batch) if hasattr(own, "switch") else contextlib.nullcontext()
    try:
        # Packed rows stay apart only without an attention mask and without a cache.
        with deciding, passing_the_tower(own, batch):
            output = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **of_rows,
                **of_images(batch),
            )  # fmt: skip
    finally:
        handle.remove()
    return output.logits, labels_BL[mask_BL]


def loss_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy summed over labels, each times its weight, in fp32: logits [N, V], labels and weights
    [N] → [].

    Its gradient is computed in the forward pass, a block of positions at a time, so that of the distributions over the
    vocabulary no more than the logits and their gradient are ever whole in memory, in the logits' own dtype.
    """
    return _SummedLoss.apply(
        logits, labels, torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
    )


class _SummedLoss(torch.autograd.Function):
    """Computes the summed loss; d loss / d logits is weight · (softmax(logits) − onehot(label))."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        total, gradient = loss_and_gradient(logits, labels, weights, logits.requires_grad)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None, None


def loss_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the summed loss, [], and if it is wanted its gradient, [N, V] in the logits' dtype."""
    gradient = torch.empty_like(logits) if wanted else None
    total = logits.new_zeros((), dtype=torch.float32)
    for part in _parts(logits):
        block, own, weight = logits[part].float().log_softmax(-1), labels[part, None], weights[part]
        total -= block.gather(1, own)[:, 0] @ weight
        if gradient is not None:
            block.exp_().scatter_add_(1, own, -torch.ones_like(own, dtype=block.dtype))
            gradient[part] = block.mul_(weight[:, None])
    return total, gradient


def _parts(logits: Tensor) -> Iterator[slice]:
    """Yields the positions of logits [N, V], some at a time."""
    limit = _CORE_BYTES * torch.get_num_threads() if logits.device.type == "cpu" else _GPU_BYTES
    size = max(1, limit // (4 * logits.shape[-1]))
    return (slice(first, first + size) for first in range(0, len(logits), size))


def likelihood_and_kl(logits: Tensor, base: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each label's log-probability, and KL(base ‖ model) of the next token at its place, in nats; [N] fp32
    each.

    `logits` and `base` are [N, V] in any float type, `labels` [N]. Without a base the KL is zero.
    """
    likelihoods, divergences = [], []
    for part in _parts(logits):
        now = logits[part].float().log_softmax(-1)
        likelihoods.append(now.gather(1, labels[part, None])[:, 0])
        if base is not None:
            before = base[part].float().log_softmax(-1)
            divergences.append((before.exp() * (before - now)).sum(-1))
    likelihood = torch.cat(likelihoods) if likelihoods else logits.new_zeros(0, dtype=torch.float32)
    return likelihood, torch.cat(divergences) if divergences else torch.zeros_like(likelihood)


@torch.no_grad()
def base_logits(model: nn.Module, batch: dict[str, Tensor], base: nn.Module | None = None) -> Tensor:
    """Returns the logits of a model's base where there is a label, [N, V]. The base is `base`, or if that is None the
    one inside the model (grow.model.alpha.base_inside); its α is kept."""
    if base is not None:
        return labelled_logits(base, batch)[0]
    with base_inside(unwrapped(model)):
        return labelled_logits(model, batch)[0]


@torch.no_grad()
def token_scores(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each label's log-probability in nats, whether it is the likeliest token, and its row; [N] each."""
    logits, labels = labelled_logits(model, batch)
    return *label_scores(logits, labels), batch["rows"][batch["labels"] != IGNORED]


def label_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each label's log-probability in nats, fp32, and whether it is the likeliest token: logits [N, V], labels
    [N] → [N] each."""
    likelihoods, hits = torch.zeros_like(labels, dtype=torch.float32), torch.zeros_like(labels, dtype=torch.bool)
    for part in _parts(logits):
        now = logits[part].float()
        # The same as argmax, four times as fast on a processor.
        hits[part] = now.max(dim=-1).indices == labels[part]
        likelihoods[part] = now.log_softmax(-1).gather(1, labels[part, None])[:, 0]
    return likelihoods, hits


def identical(logits: Tensor, base: Tensor) -> Tensor:
    """Says where logits are another model's bit for bit: [N, V] each → bool [N]."""
    found = [(logits[part] == base[part]).all(-1) for part in _parts(logits)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool, device=logits.device)
