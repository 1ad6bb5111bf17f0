"""General text, packed, on which a model is compared with its base."""

from typing import Any

from torch import Tensor

from grow.data.load import load_rows
from grow.data.packing import Epochs, PackedDataset
from grow.data.template import Template
from grow.data.tokenizer import pad_token_id
from grow.data.tokens import encode_cached
from grow.errors import UserError


class GeneralText:
    """Draws sequences from several folders in turn, whatever their sizes: item i, for any i, is of folder i mod n.

    Each folder's order is drawn from the seed, anew whenever the folder begins again.
    """

    def __init__(self, folders: list[PackedDataset], seed: int):
        self.folders = folders
        self.orders = [Epochs(sequences, len(sequences), seed) for sequences in folders]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place, turn = divmod(index, len(self.orders))
        return self.orders[turn][place]


def general_text(folders: list[str], max_length: int, tokenizer: Any, seed: int) -> GeneralText:
    """Returns the packed rows of the folders' split train, which have a column text. Raises UserError for a folder
    without any."""
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
