"""The norm of the task's gradient at each weight matrix of the base ranks layers without a pilot run."""

from typing import Any

import torch
from tqdm import tqdm

from grow.analysis.ranking import Norms
from grow.checkpoint.updates import matrix_of
from grow.data.of_recipe import read_sequences
from grow.data.packing import Epochs, collate
from grow.data.tokenizer import load_tokenizer
from grow.errors import UserError
from grow.model.layouts import decoder_mlps
from grow.model.loading import checkpoint_activations, compute_device, compute_dtype, load
from grow.model.loss import labelled_logits, loss_sum
from grow.recipe import Recipe


def gradient_norms(recipe: Recipe, batches: int) -> tuple[list[Norms], int]:
    """Returns the Frobenius norms of the mean loss's gradient and of the weights, for each of the first `batches`
    batches that a run would see; and how many layers the model has. Nothing is trained.

    Raises UserError for rows that cannot be used, and for an invalid number of batches.
    """
    if batches < 1:
        raise UserError(f"--batches {batches}: at least 1 is needed")
    sequences = read_sequences(recipe, load_tokenizer(recipe.base_name), recipe.train_split)
    order = Epochs(sequences, batches * recipe.train_batch_size, recipe.seed)

    model = load(recipe.base_name, compute_dtype())
    model.to(compute_device())
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    weights: dict[tuple[int, str], Any] = {}
    for name, parameter in model.named_parameters():
        place = matrix_of(name, parameter.shape)
        parameter.requires_grad_(place is not None)
        if place is not None:
            weights[place] = parameter
    found = [
        _of_batch(model, weights, [order[batch * recipe.train_batch_size + i] for i in range(recipe.train_batch_size)])
        for batch in tqdm(range(batches), desc="gradients", leave=False, disable=None)
    ]
    return found, len(decoder_mlps(model))


def _of_batch(model: Any, weights: dict[tuple[int, str], Any], sequences: list[dict[str, torch.Tensor]]) -> Norms:
    model.zero_grad(set_to_none=True)
    labels = 0
    for sequence in sequences:  # one at a time: all of a batch's logits would be gigabytes
        batch = {name: tensor.to(model.device) for name, tensor in collate([sequence]).items()}
        logits, targets = labelled_logits(model, batch)
        loss_sum(logits, targets).backward()
        labels += len(targets)
    norms: Norms = {}
    for (layer, matrix), weight in weights.items():
        sizes = (float(weight.grad.float().norm()) / labels, float(weight.detach().float().norm()))
        norms.setdefault(layer, {})[matrix] = sizes
    return norms
