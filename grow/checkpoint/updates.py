"""Weight updates: each weight matrix of the decoder layers before and after training, read by rows.

No model is built. The copies of a grown model are compared with their initial values: gate and up with the base's own,
the down-projection with the base's divided by k.
"""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from grow.checkpoint.copies import expected_growth
from grow.checkpoint.lazy import LazyTensor, elementwise
from grow.checkpoint.trained_weights import ExportFunction, TrainedWeights, as_trained, load_trained
from grow.errors import UserError
from grow.names import LAYERS, is_growth, mlp_prefixes, of_language_model, own_name

_MATRIX = re.compile(rf"(?:.*\.)?{LAYERS}\.(\d{{1,6}})\.(.+)\.weight", re.ASCII)


@dataclass(frozen=True)
class Update:
    """Holds the update of one matrix of one layer. `matrix` is its name in the layer, such as mlp.gate_proj or
    self_attn.q_proj; added copies have the name of the matrix that they copy. `before` and `after` are of one shape,
    two-dimensional."""

    layer: int
    matrix: str
    before: LazyTensor
    after: LazyTensor

    @property
    def change(self) -> LazyTensor:
        """Returns after − before, in fp32."""
        return elementwise(operator.sub, "F32", self.after, self.before)


def read_updates(
    path: str, start: str = "", tag: str = "", export: ExportFunction = as_trained
) -> tuple[list[Update], int]:
    """Returns the updates of a run, of one of its checkpoints, of a grown checkpoint, or, with `start`, of a stock
    checkpoint that was trained from that one, by layer, then by name; and how many layers the model has.

    Matrices that cannot have trained are left out. Raises UserError for anything else (load_trained), and where no
    layer has such a matrix.
    """
    source = load_trained(path, start, tag, 1, export)
    found = []
    for name, before in _starts(source).items():
        place = matrix_of(name, before.shape)
        if place is not None:
            found.append(Update(place[0], place[1].replace(".grown.", "."), before, source.tensor(name)))
    if not found:
        raise UserError(f"{path}: none of its layers has a weight matrix that trained")
    return sorted(found, key=lambda update: (update.layer, update.matrix)), len(mlp_prefixes(source.start.tensors))


def matrix_of(name: str, shape: Sequence[int]) -> tuple[int, str] | None:
    """Returns the layer of a weight matrix and its name there, such as (3, "mlp.gate_proj"); None for anything that is
    not a matrix of a decoder layer."""
    match = _MATRIX.fullmatch(name)
    return (int(match[1]), match[2]) if match and len(shape) == 2 and of_language_model(name) else None


def _starts(source: TrainedWeights) -> dict[str, LazyTensor]:
    """Returns every tensor that training may have changed, by name, as it was before."""
    # The up-projections that g_train has added begin as the base's own; a plan knows how the copies begin.
    starts = {name: source.start.lazy(own_name(name)) for name in source.trained}
    if source.plan is None:
        return starts
    elsewhere = source.start.config["growth"].get("copies_from")
    if not elsewhere:
        return starts | expected_growth(source.start, source.plan)[0]
    if not source.trained:
        raise UserError(f"{source.start.path}: its copies came from {elsewhere}; name the run, which knows its start")
    return starts | {name: source.start.lazy(name) for name in source.start.tensors if is_growth(name)}
