"""The input embedding: the rows that tokens are looked up in."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from grow.names import canonical
from grow.parts.part import Base, Field, Part
from grow.plan import Where, with_text_config

_HEAD = "lm_head.weight"


class Embedding(Part):
    """One matrix, which trains with the base's own kept. A head that is tied to it stays the base's, so that a stock
    model has both."""

    name = "embedding"
    made_of = "matrix"
    fields: ClassVar = {
        "train_embedding": Field(
            False, "The input embedding trains as well, with its base kept; a head that is tied to it does not."
        ),
    }
    has_layers = False
    reads_below = 1  # of layer 0: every MLP reads what has changed

    def layer_of(self, module: str) -> int | None:
        """Returns 0 for the embedding, whatever a class calls it."""
        return 0 if canonical(f"{module}.weight") == "embed_tokens.weight" else None

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns its one matrix."""
        return (("weight",),)

    def stock_beside(self, base: Base) -> Mapping[str, str]:
        """Returns the head that a base ties to its embedding."""
        if any(canonical(name) == _HEAD for name in base.tensors):
            return {}
        own = f"{self.prefixes(base.tensors)[0]}.weight"
        wrapper = "language_model." * own.startswith("language_model.")  # multimodal models as they are on the hub
        return {f"{wrapper}{_HEAD}": own}

    def stock_config(self, config: dict[str, Any], base: Base, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Unties the head."""
        untied = {"tie_word_embeddings": False}
        return with_text_config(config, untied) | untied

    def named(self, where: Where) -> str:
        """Returns what it is, in words."""
        return "the input embedding"
