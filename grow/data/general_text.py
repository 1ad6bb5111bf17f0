"""General text, packed, on which a model is compared with its base."""

from typing import Any

from torch import Tensor

from grow.data.examples import all_learnt
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


def general_text(
    folders: list[str], max_length: int, tokenizer: Any, seed: int, own: list[list[int]] | None = None
) -> GeneralText:
    """Returns the packed rows of the folders' split train, which have a column text. `own` are passages, in tokens, of
    what the base writes by itself, in the place of the folder "self"; None before they are written.

    Raises UserError for a folder without any.
    """
    template, packed = Template("", "{text}"), []
    for folder in folders:
        if folder == "self":
            # A base may end its text at once.
            passages = [passage[:max_length] for passage in own or () if len(passage) > 1]
            if own and not passages:
                raise UserError("kl_text: self: the base writes nothing by itself; name a folder of text")
            packed += [PackedDataset(all_learnt(passages), max_length, pad_token_id(tokenizer))] if own else []
            continue
        rows = load_rows(folder, "train")
        examples = encode_cached(rows, tokenizer, template, max_length, end=False).examples
        if not examples:
            raise UserError(
                f"kl_text: {folder}: no row of its split train is of at most max_length {max_length} tokens"
            )
        packed.append(PackedDataset(examples, max_length, pad_token_id(tokenizer)))
    return GeneralText(packed, seed)
