"""How far a model is from its base on general text, as a term of the loss.

A base that is inside the model needs no second model and no memory of its own: it is the same forward pass with the
dial at 0, or the LoRAs'.
"""

from typing import Any

import torch
from torch import Tensor

from grow.data.examples import IGNORED
from grow.data.packing import Epochs, PackedDataset, collate
from grow.data.rows import load_rows
from grow.data.template import Template
from grow.data.tokenizer import pad_token_id
from grow.data.tokens import encode_cached
from grow.errors import UserError
from grow.loss import base_logits, compare, labelled_logits

_POSITIONS = 64
"""Of a sequence, at so many places, evenly spread: each costs a row of the vocabulary head, three times over."""


class GeneralText:
    """Sequences of several folders, which take turns whatever their sizes: item i, of any i, is of folder i mod n.

    Each folder's order is drawn from the seed, anew whenever the folder begins again.
    """

    def __init__(self, folders: list[PackedDataset], seed: int):
        self.folders = folders
        self.orders = [Epochs(sequences, len(sequences), seed) for sequences in folders]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place, turn = divmod(index, len(self.orders))
        return self.orders[turn][place]


def general_text(folders: list[str], max_length: int, tokenizer: Any, seed: int) -> GeneralText:
    """The rows of the folders' split train, which have a column text, packed. Raises UserError for one without any."""
    template, packed = Template("", "{text}"), []
    for folder in folders:
        rows = load_rows(folder, "train")
        own = encode_cached(rows, tokenizer, template, max_length, end=False).examples
        if not own:
            raise UserError(
                f"kl_text: {folder}: no row of its split train is of at most max_length {max_length} tokens"
            )
        packed.append(PackedDataset(own, max_length, pad_token_id(tokenizer)))
    return GeneralText(packed, seed)


class NearBase:
    """KL(base ‖ model) of the next token, nats, on one sequence of general text a rank and step.

    `base` is the model to stay near; None: the one inside. Which sequence depends on the step alone, so that a run
    that goes on sees what it would have seen.
    """

    def __init__(self, trainer: Any, text: GeneralText, base: Any = None):
        self.trainer, self.text, self.base, self.step = trainer, text, base, -1

    def divergence(self) -> Tensor | float:
        """The mean over places: [] fp32; 0 but for the first micro-batch of a step, which stands for all of them."""
        trainer, args = self.trainer, self.trainer.args
        if trainer.state.global_step == self.step:
            return 0.0
        self.step = trainer.state.global_step
        place = self.step * args.world_size + args.process_index
        batch = {name: tensor.to(args.device) for name, tensor in collate([self.text[place]]).items()}
        return divergence(trainer.model_wrapped, batch, self.base) * args.gradient_accumulation_steps


def divergence(model: Any, batch: dict[str, Tensor], base: Any = None) -> Tensor:
    """KL(base ‖ model), nats, the mean over some of the batch's labels, whose others are taken away: [] fp32.

    `base` None: the one inside.
    """
    _thin_out(batch["labels"])
    expected = base_logits(model, batch, base)
    logits, labels = labelled_logits(model, batch)
    return compare(logits, expected, labels)[1].mean()


def _thin_out(labels_BL: Tensor) -> None:
    places = (labels_BL != IGNORED).nonzero()
    every = max(1, len(places) // _POSITIONS)
    dropped = places[torch.arange(len(places), device=places.device) % every != 0]
    labels_BL[dropped[:, 0], dropped[:, 1]] = IGNORED
