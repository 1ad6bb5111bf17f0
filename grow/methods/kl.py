"""KL regularisation towards the frozen base, on general text.

A base that is inside the model needs no second model and no memory of its own: it is the same forward pass at α = 0, or
with the LoRAs at 0.
"""

import sys
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.writer import weights_checksum
from grow.data.labels import IGNORED
from grow.data.packing import collate
from grow.errors import UserError
from grow.methods.method import Method
from grow.model.loss import base_logits, labelled_logits, likelihood_and_kl

SELF = "self"
"""In the place of a folder of general text: what the base writes by itself."""
_POSITIONS = 64
"""The positions of a sequence that count, evenly spread: each costs three rows of the vocabulary head."""


@dataclass
class KlRegularized(Method):
    """Trains with `kl_weight` times KL(base ‖ model) of the next token added to the loss, on general text.

    `kl_text` are folders whose split train has rows with a column text; they take turns. "self" among them is text that
    the base writes by itself, `self_tokens` of it (arXiv 2505.13811): nothing from outside is needed then. It costs a
    forward pass of the base and a step's work on one sequence more. Methods that keep the base inside the model need no
    more memory. The others hold a whole second model on every rank, and so do not work with ZeRO-3.
    """

    kl_weight: float = 0.0
    kl_text: list[str] = field(default_factory=list)
    self_tokens: int = 16_384

    def check(self, recipe: Any) -> None:
        """Raises UserError also for a weight without text, and where the base cannot be kept beside the model."""
        super().check(recipe)
        if self.kl_weight < 0 or (self.kl_weight > 0) != bool(self.kl_text):
            raise UserError("kl_weight (above 0) and kl_text, folders of general text or self, go together")
        if self.self_tokens < 1:
            raise UserError("self_tokens must be at least 1")
        if self.kl_weight and not self.keeps_base and recipe.zero.get("stage") == 3:
            raise UserError(
                f"{recipe.deepspeed}: {recipe.method} with kl_weight holds a second model and does not work with "
                "ZeRO-3; give --deepspeed a config of stage 1 or 2"
            )
        if self.kl_weight and recipe.gradient_checkpointing and recipe.switch.startswith("call:"):
            raise UserError(
                "switch: call: with kl_weight and gradient_checkpointing: activations would be computed again for "
                "another batch than they were computed for; leave one of the three out"
            )
        if self.kl_text:
            self._text(recipe)

    def texts_read(self, recipe: Any) -> list[str]:
        """Names the folders of general text."""
        return [text for text in self.kl_text if text != SELF] if self.kl_weight else []

    def make(self, recipe: Any) -> Any:
        """Returns the text that the base writes, if it is asked for: passages of tokens."""
        if not self.kl_weight or SELF not in self.kl_text:
            return None
        from grow.data.of_recipe import tokenizer_of
        from grow.data.writing import SELF_LENGTH, self_text
        from grow.model.loading import compute_device, compute_dtype, load

        print("kl_text: the base writes text by itself", file=sys.stderr, flush=True)
        return self_text(
            lambda: load(recipe.base_name, compute_dtype()).to(compute_device()), tokenizer_of(recipe),
            weights_checksum(Checkpoint(recipe.base_name).shards), self.self_tokens,
            length=min(SELF_LENGTH, recipe.max_length),
        )  # fmt: skip

    def extra_bytes(self, shapes: dict[str, tuple[int, ...]], width: int) -> int:
        """Counts the bytes of the second model."""
        return width * sum(map(prod, shapes.values())) if self.kl_weight and not self.keeps_base else 0

    def begin(self, trainer: Any) -> None:
        """Reads the general text, and the base where it is not inside."""
        if not self.kl_weight:
            return
        from grow.model.loading import load  # imports transformers, which reading a recipe does not need

        base = None
        if not self.keeps_base:
            base = load(trainer.recipe.base_name, trainer.model.dtype).to(trainer.args.device)
        self.term = KlTerm(trainer, self._text(trainer.recipe), base)

    def _text(self, recipe: Any) -> Any:
        from grow.data.general_text import general_text  # imports transformers and datasets: see above
        from grow.data.of_recipe import tokenizer_of
        from grow.data.writing import begin_token

        tokenizer = tokenizer_of(recipe)
        if SELF in self.kl_text:
            begin_token(tokenizer)
        return general_text(self.kl_text, recipe.max_length, tokenizer, recipe.seed, self.made)

    def penalty(self) -> Tensor | float:
        """Returns the KL term times its weight."""
        return self.kl_weight * self.term.value() if self.kl_weight else 0.0


class KlTerm:
    """Computes KL(base ‖ model) of the next token, nats, on one sequence of general text a rank and step.

    `text` is a grow.data.general_text.GeneralText. `base` is the frozen base, or None for the one inside the model. The
    sequence depends on the step alone, so that a resumed run sees what it would have seen.
    """

    def __init__(self, trainer: Any, text: Any, base: Any = None):
        self.trainer, self.text, self.base, self.step = trainer, text, base, -1

    def value(self) -> Tensor | float:
        """Returns the mean over positions, [] fp32, for the first micro-batch of a step, which counts for all; 0 for
        the others."""
        trainer, args = self.trainer, self.trainer.args
        if trainer.state.global_step == self.step:
            return 0.0
        self.step = trainer.state.global_step
        place = self.step * args.world_size + args.process_index
        batch = {name: tensor.to(args.device) for name, tensor in collate([self.text[place]]).items()}
        return sampled_kl(trainer.model_wrapped, batch, self.base) * args.gradient_accumulation_steps


def sampled_kl(model: Any, batch: dict[str, Tensor], base: Any = None) -> Tensor:
    """Returns KL(base ‖ model), nats, the mean over a sample of the batch's labels, [] fp32. The other labels are
    removed.

    `base` is the frozen base, or None for the one inside the model.
    """
    _thin_out(batch["labels"])
    expected = base_logits(model, batch, base)
    logits, labels = labelled_logits(model, batch)
    return likelihood_and_kl(logits, expected, labels)[1].mean()


def _thin_out(labels_BL: Tensor) -> None:
    places = (labels_BL != IGNORED).nonzero()
    every = max(1, len(places) // _POSITIONS)
    dropped = places[torch.arange(len(places), device=places.device) % every != 0]
    labels_BL[dropped[:, 0], dropped[:, 1]] = IGNORED
