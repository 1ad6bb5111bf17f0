"""What a checkpoint or a run knows of its switch: a JSON object, under "switch" in the growth's metadata, or in a
file of a run's own, RUN/switch/switch.json."""

import base64
import binascii
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grow.checkpoint.shards import read_json
from grow.errors import UserError

NAME = "switch.json"
LOOKS_BACK = 8
KINDS = ("row", "token", "answer", "call")


@dataclass(frozen=True)
class SwitchRecord:
    """Says when what was trained acts: where w · x > threshold, x [h] being the input of the MLP of layer `layer`.

    `kind` is where that is read, and for which tokens it holds: "row", at the end of the prompt, for the whole row;
    "answer", there too, for the row from its last token on; "token", at each token for itself. At the end of the
    prompt x is a mean over its last LOOKS_BACK tokens, each of which weighs `decay` times what the next one does (0:
    the last one alone). The kind "call" reads nothing: the skill is on from the last place in the prompt where `tokens`
    stand. `weight` is w, fp32 [h]. `facts` are what is known of the fit.
    """

    kind: str
    layer: int = -1
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), compare=False)
    threshold: float = 0.0
    decay: float = 0.0
    tokens: tuple[int, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Returns the JSON object; w is written as little-endian fp32 in base64."""
        if self.kind == "call":
            return {"kind": self.kind, "tokens": list(self.tokens), "facts": self.facts}
        weight = base64.b64encode(self.weight.astype("<f4").tobytes()).decode()
        return {
            "kind": self.kind, "layer": self.layer, "threshold": self.threshold, "decay": self.decay, "weight": weight,
            "facts": self.facts,
        }  # fmt: skip


def read_switch(values: Any, where: Path) -> SwitchRecord:
    """Reads the JSON object. Raises UserError, naming the file `where` it stands, if it makes no sense."""
    try:
        kind, facts = values["kind"], values["facts"]
        if kind not in KINDS or not isinstance(facts, dict):
            raise ValueError(f"kind {kind!r}")
        if kind == "call":
            tokens = values["tokens"]
            if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
                raise ValueError("no tokens")
            return SwitchRecord(kind, tokens=tuple(tokens), facts=facts)
        weight = np.frombuffer(base64.b64decode(values["weight"], validate=True), "<f4").copy()
        layer, threshold, decay = values["layer"], float(values["threshold"]), float(values.get("decay", 0))
        sound = type(layer) is int and layer >= 0 and len(weight) and np.isfinite(weight).all()
        if not sound or not math.isfinite(threshold) or not 0 <= decay < 1:
            raise ValueError("layer, weight, threshold or decay")
        return SwitchRecord(kind, layer, weight, threshold, decay, facts=facts)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"{where}: its switch is not what this program writes ({error})") from None


def switch_file(run: Path) -> Path:
    """Returns where a run has its switch."""
    return run / "switch" / NAME


def switch_of_run(run: Path) -> SwitchRecord | None:
    """Returns a run's switch; None if it has none."""
    file = switch_file(run)
    return read_switch(read_json(file), file) if file.is_file() else None
