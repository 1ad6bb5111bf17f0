"""A bottleneck adapter after every MLP; the model itself is frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.output import OutputFolder, no_progress, side_files
from grow.checkpoint.run_folder import final_checkpoint
from grow.checkpoint.shards import Checkpoint, read_json
from grow.checkpoint.trained_weights import Export
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError
from grow.methods.kl import KlRegularized
from grow.model.bottleneck import CONFIG, FILE, adapt_mlp
from grow.model.layouts import decoder_mlps
from grow.names import DOWN, mlp_prefixes


@dataclass
class Adapter(KlRegularized):
    """Trains a bottleneck of `adapter_size` after each layer's MLP (grow.model.bottleneck; Houlsby et al. 2019)."""

    keeps_base: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    adapter_size: int = 64

    def add_parameters(self, model: Any) -> None:
        """Adds the adapters."""
        for _, mlp in sorted(decoder_mlps(model).items()):
            adapt_mlp(mlp, self.adapter_size)

    def added_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of two layers with biases after each MLP."""
        found: dict[str, tuple[int, ...]] = {}
        size = self.adapter_size
        for prefix in mlp_prefixes(shapes).values():
            hidden = next(shapes[f"{prefix}.{name}.weight"][0] for name in DOWN if f"{prefix}.{name}.weight" in shapes)
            own = {
                "down_proj.weight": (size, hidden), "down_proj.bias": (size,),
                "up_proj.weight": (hidden, size), "up_proj.bias": (hidden,),
            }  # fmt: skip
            found |= {f"{prefix}.adapter.{name}": shape for name, shape in own.items()}
        return found

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to an adapter."""
        return ".mlp.adapter." in name

    def export(self, start: Checkpoint, trained: dict[str, LazyTensor], dtype: str) -> Export:
        """Raises UserError: an adapter cannot be exported."""
        raise UserError(
            "adapter: a bottleneck is not linear, so no weights of a stock model can hold it; "
            "give `eval` the run's folder result/, which has the adapter"
        )

    def write_result(self, run: Path, out: Path) -> None:
        """Writes the adapter in a folder of its own, with the base's tokenizer, in fp32; grow.model.loading.load loads
        it."""
        zero = ZeroCheckpoint(final_checkpoint(run))
        start = Checkpoint(read_json(run / "run.json")["start"])
        with OutputFolder(out, {"adapter of": zero.identity()}) as folder:
            folder.write_shards({FILE: zero.trained}, no_progress)
            for file in side_files(start.path):
                folder.copy(file)
            folder.write_json(CONFIG, {"base": str(start.path.resolve()), "adapter_size": self.adapter_size})
