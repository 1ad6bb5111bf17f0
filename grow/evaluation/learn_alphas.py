"""Learns an interpolation coefficient α for each layer: layers differ in what they gain and in what they forget.

Only α trains, one number for each grown layer, so a few steps on held-out rows suffice.
"""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from grow.checkpoint.output import refuse_existing
from grow.checkpoint.package import set_layer_alphas
from grow.checkpoint.shards import Checkpoint
from grow.data.general_text import GeneralText, general_text
from grow.data.of_recipe import read_sequences
from grow.data.packing import Epochs, PackedDataset, collate
from grow.data.tokenizer import load_tokenizer
from grow.errors import UserError
from grow.evaluation.interpolation import Interpolation
from grow.methods.kl import sampled_kl
from grow.model.grown import grown_mlps
from grow.model.loss import labelled_logits, loss_sum
from grow.plan import GrowthPlan
from grow.recipe import Recipe

_START, _RATE, _EDGE = 0.6, 0.05, 1e-3
"""The initial α, Adam's rate, and the least distance of α from 0 and 1, at which it would have no gradient."""


def learn_alphas(path: str, out: str, recipe: Recipe, text: list[str], kl_weight: float, steps: int) -> dict[str, Any]:
    """Writes OUT, the grown checkpoint at `path` with an α for each grown layer; its shards are linked.

    Minimises, over the α, task loss + `kl_weight` · KL(base ‖ model), in nats per token, by Adam: the loss on the
    recipe's validation rows, KL on the split train of the folders `text`, one sequence of each a step. Returns the α,
    and `task_loss` and `kl`, the means over the first and the last quarter of the steps. Raises UserError if `path` is
    not a grown checkpoint, if there are no such rows, or if OUT is there.
    """
    refuse_existing(Path(out))
    plan = GrowthPlan.from_config(Checkpoint(path).config)
    if plan is not None and plan.beside:
        raise UserError(
            f"{path}: more than MLPs of its decoder layers has grown, and only these have an α of their own so far"
        )
    if plan is None:
        raise UserError(f"{path}: was not grown, so its layers have no interpolation coefficient")
    tokenizer = load_tokenizer(path)
    general = general_text(text, recipe.max_length, tokenizer, recipe.seed)
    task = read_sequences(recipe, tokenizer, recipe.validation_split)
    alphas, losses = _learn(Interpolation(path).model, task, general, kl_weight, steps, recipe.seed)
    quarter = max(1, steps // 4)
    ends = [torch.tensor(part).mean(0).tolist() for part in (losses[:quarter], losses[-quarter:])]
    return set_layer_alphas(path, out, [round(alpha, 3) for alpha in alphas]) | {
        "kl_weight": kl_weight,
        "steps": steps,
        "task_loss": [end[0] for end in ends],
        "kl": [end[1] for end in ends],
    }


def _learn(
    model: Any, task: PackedDataset, general: GeneralText, kl_weight: float, steps: int, seed: int
) -> tuple[list[float], list[list[float]]]:
    """Returns the α, lowest layer first, and task loss and KL of each step."""
    model.requires_grad_(False)
    mlps, losses = list(grown_mlps(model)), []
    alphas = torch.full((len(mlps),), _START, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([alphas], lr=_RATE)
    tasks = Epochs(task, steps, seed)
    for step in tqdm(range(steps), desc="learning α", leave=False, disable=None):
        rows, text = ({k: v.to(model.device) for k, v in collate([own[step]]).items()} for own in (tasks, general))
        for mlp, alpha in zip(mlps, alphas, strict=True):
            mlp.alpha = alpha
        logits, labels = labelled_logits(model, rows)
        loss, kl = loss_sum(logits, labels) / len(labels), sampled_kl(model, text)
        (loss + kl_weight * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            alphas.clamp_(_EDGE, 1 - _EDGE)
        losses.append([loss.item(), kl.item()])
    snapped = (alphas - 0.5).abs() >= 0.5 - 2 * _EDGE
    return torch.where(snapped, alphas.round(), alphas).tolist(), losses
