"""The tokenizer of a checkpoint."""

from typing import Any

from transformers import AutoTokenizer

from grow.checkpoint.hub import FROM_FOLDER, locate
from grow.checkpoint.shards import Checkpoint
from grow.errors import UserError, innermost
from grow.names import canonical

_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
_ENDINGS = (".model", ".tiktoken", ".spm")


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a checkpoint's folder or hub name. Raises UserError if transformers cannot load it."""
    folder = locate(name)
    if not any(file.name.startswith(_FILES) or file.suffix in _ENDINGS for file in folder.iterdir()):
        # transformers would make one up, of a handful of tokens
        raise UserError(
            f"{folder}: has no tokenizer; save the base's there: tokenizer.save_pretrained({str(folder)!r})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **FROM_FOLDER)
    except Exception as error:  # the library raises many kinds, all of them about what is in the folder
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {innermost(error)}") from error
    tokenizer.name_or_path = str(folder)
    return tokenizer


def check_vocabulary(largest: int, checkpoint: Checkpoint) -> None:
    """Raises UserError if the largest id of a token is beyond the rows of a checkpoint's embedding."""
    for name, info in checkpoint.tensors.items():
        if canonical(name) == "embed_tokens.weight" and largest >= info.shape[0]:
            raise UserError(
                f"{checkpoint.path}: its tokenizer writes the token {largest}, but the embedding has "
                f"{info.shape[0]} rows: the tokenizer is of another model, or tokens were added to it alone"
            )


def pad_token_id(tokenizer: Any) -> int:
    """Returns the id of padding, which no row sees: the pad token, or 0 if there is none."""
    return tokenizer.pad_token_id or 0
