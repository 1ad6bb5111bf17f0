"""A run measures, every `eval_steps`, its retention and how far it has moved from its base, besides its loss.

If the base is inside the model, the distance from it needs no second model: it is the same forward pass at α = 0. A
method that does not keep its base measures retention alone.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.files import write_text
from grow.data.packing import PackedDataset
from grow.model.gather import gathered
from grow.model.grown import grown_units
from grow.model.layouts import down_layer, halves, matrix, up_layers
from grow.model.loss import base_logits, labelled_logits, likelihood_and_kl
from grow.model.switched import switch_decided


class Probe:
    """Measures retention on its rows (`sequences`; their labels are the answers), on all ranks together."""

    def __init__(self, sequences: PackedDataset, out: Path):
        self.sequences, self.out = sequences, out
        self.rows = len(sequences.packed)
        self.begun, self.spent = time.monotonic(), 0.0

    @torch.no_grad()
    def measure(self, trainer: Any) -> dict[str, float]:
        """Returns, to be logged:

        `retention`: log-likelihood of an answer, nats, the mean over rows;
        `kl_from_base`, if the base is inside: KL(base ‖ model) of the next token where there is a label, nats, the mean
        over labels;
        `retention_open`, if the model has a switch: the share of the rows that it opens for;
        and of a grown model
        `cosine_min`: of copies and originals (gate and up), the smallest over layers;
        `update_max`: the Frobenius norm of what a layer's copies have moved, the largest over layers;
        `probe_share`: the share of the run's time that all this took.
        On rank 0 the figures of every layer go to the file `out`, a line of JSON each time.
        """
        start = time.monotonic()
        keeps_base = trainer.method.keeps_base
        total = torch.zeros(5, dtype=torch.float64, device=trainer.args.device)
        for batch in trainer.own_batches(self.sequences):
            total += _score(trainer.model_wrapped, batch, keeps_base)
        likelihood, divergence, labels, opened, decided = trainer.accelerator.reduce(total, "sum").tolist()
        found = {"retention": likelihood / self.rows}
        if keeps_base:
            found["kl_from_base"] = divergence / labels
        if decided:
            found["retention_open"] = opened / decided
        layers = [_moved(mlp) for mlp in grown_units(trainer.model)]
        if layers:
            found |= {
                "cosine_min": min(layer["cosine"] for layer in layers),
                "update_max": max(layer["update"] for layer in layers),
            }
            if trainer.args.process_index == 0:
                self._note({"step": trainer.state.global_step, **found, "layers": layers})
        self.spent += time.monotonic() - start
        return found | {"probe_share": self.spent / (time.monotonic() - self.begun)}

    def _note(self, line: dict[str, Any]) -> None:
        # A run that was killed resumes from a checkpoint, and measures again what came after that.
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        kept = [text for text in lines if json.loads(text)["step"] < line["step"]]
        write_text(self.out, "".join(f"{text}\n" for text in [*kept, json.dumps(line)]))


def _score(model: Any, batch: dict[str, Tensor], keeps_base: bool) -> Tensor:
    """Sums over a batch's labels: log-likelihood, KL from the base, their count; then what a switch has opened for, and
    what it has decided: rows, or tokens; [5] fp64."""
    logits, labels = labelled_logits(model, batch)
    decided = switch_decided(model)
    base = base_logits(model, batch) if keeps_base else None
    sums = torch.zeros(5, dtype=torch.float64, device=logits.device)
    if decided is not None:
        sums[3], sums[4] = decided.sum(), decided.numel()
    likelihoods, divergences = likelihood_and_kl(logits, base, labels)
    sums[0], sums[1], sums[2] = likelihoods.double().sum(), divergences.double().sum(), len(labels)
    return sums


def _moved(mlp: Any) -> dict[str, float]:
    """Returns how far a layer's copies have moved from the originals (cosine of gate and up together) and from where
    they started (Frobenius norm over gate, up and down; for k > 2 their initial offsets count too, and for copies of
    another checkpoint what they differ in)."""
    weights: list[Any] = [layer.weight for layer in (*up_layers(mlp), down_layer(mlp))]
    with gathered(*weights, *mlp.grown.parameters()):
        copies, parts = mlp.factor - 1, halves(mlp)
        dot = own = other = moved = torch.zeros((), device=weights[0].device)
        for original, layer in zip(up_layers(mlp), up_layers(mlp.grown), strict=True):
            matrices = matrix(original).detach().float().chunk(parts)
            start, copy = torch.cat([matrix.repeat(copies, 1) for matrix in matrices]), _weight(layer)
            dot, own, other = dot + (start * copy).sum(), own + start.square().sum(), other + copy.square().sum()
            moved = moved + (copy - start).square().sum()
        start = matrix(down_layer(mlp)).detach().float().repeat(1, copies) / mlp.factor
        moved = moved + (_weight(down_layer(mlp.grown)) - start).square().sum()
        return {"cosine": float(dot / (own * other).sqrt()), "update": float(moved.sqrt())}


def _weight(layer: Any) -> Tensor:
    """Returns a linear layer's weight in fp32, with the update of PEFT's LoRA, if there is one (g_lora)."""
    weight = matrix(layer).detach().float()
    if hasattr(layer, "get_delta_weight"):
        weight = weight + sum(layer.get_delta_weight(name).detach().float() for name in layer.active_adapters)
    return weight
