"""The common part of the PEFT library's methods: adapters put into the linear layers, a PEFT folder at the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.output import OutputFolder, no_progress, side_files
from grow.checkpoint.run_folder import counting_checkpoints
from grow.checkpoint.shards import Checkpoint, read_json
from grow.checkpoint.switch_record import switch_file
from grow.checkpoint.trained_weights import Export
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError
from grow.methods.method import Method
from grow.names import canonical, layer_of


@dataclass
class PeftMethod(Method):
    """Trains an adapter in every linear layer of the language model, or in some; the layers themselves are frozen.

    `part` stands in the names of the adapter's parameters, after that of the layer.
    """

    part: ClassVar[str]

    def config(self, target_modules: list[str], count: int = 1) -> Any:
        """Returns PEFT's configuration, for these layers, of the mean of so many checkpoints."""
        raise NotImplementedError

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a layer's adapter, by the ends of their names, which begin with `part` if they
        train."""
        raise NotImplementedError

    def merged(self, own: LazyTensor, parts: dict[str, LazyTensor], dtype: str) -> LazyTensor:
        """Returns a layer's weight with its adapter merged into it, [out, in] fp32. `own` is the base's weight, `parts`
        are the adapter's parameters, by their names within the layer without the adapter's own name."""
        raise NotImplementedError

    def mean(self, parts: list[dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
        """Returns the adapter of a layer whose update is the mean of those of several checkpoints. One is its own
        mean."""
        (only,) = parts
        return only

    def targets(self, name: str) -> bool:
        """Says whether a linear layer gets an adapter, by its name or its weight's."""
        return layer_of(name) is not None

    def add_parameters(self, model: Any) -> None:
        """Puts the adapters in. The model keeps its class, so that other code need not know of them."""
        import peft

        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        layers = list(filter(self.targets, linear))
        peft.inject_adapter_in_model(self.config(layers), model)

    def added_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the adapters of those layers."""
        return {
            name.removesuffix(".weight") + part: size
            for name, shape in shapes.items()
            if len(shape) == 2 and self.targets(name)
            for part, size in self.parts(*shape).items()
        }

    def trains(self, name: str) -> bool:
        """Says whether a parameter belongs to an adapter."""
        return self.part in name

    def export(self, start: Checkpoint, trained: dict[str, LazyTensor], dtype: str) -> Export:
        """Merges each layer's adapter into the weights that the base has."""
        on_disk = {canonical(name): name for name in start.tensors}
        found = {}
        for layer, parts in self._by_layer(trained).items():
            key = on_disk.get(canonical(f"{layer}.weight"))
            if key is None:
                raise UserError(f"{start.path}: has no {layer}, which the adapter is for; was the base replaced?")
            found[f"{layer}.weight"] = self.merged(start.lazy(key), parts, dtype)
        return Export(found)

    def _by_layer(self, trained: dict[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
        layers: dict[str, dict[str, LazyTensor]] = {}
        for name, tensor in trained.items():
            layer, part, rest = name.partition(self.part)
            layers.setdefault(layer, {})[(part + rest).replace(".default", "").lstrip(".")] = tensor
        return layers

    def write_result(self, run: Path, out: Path) -> None:
        """Writes a folder as PEFT does, in fp32: PeftModel.from_pretrained(base, RUN/result) loads it."""
        zeros = [ZeroCheckpoint(path) for path in counting_checkpoints(run)]
        parts_of = [self._by_layer(zero.trained) for zero in zeros]
        layers = {layer: self.mean([parts[layer] for parts in parts_of]) for layer in parts_of[0]}
        tensors = {
            f"base_model.model.{layer}.{name}": tensor
            for layer, parts in layers.items()
            for name, tensor in parts.items()
        }
        config = self.config(sorted(layers), len(zeros))
        config.base_model_name_or_path, config.inference_mode = read_json(run / "run.json")["start"], True
        with OutputFolder(out, {"adapter of": [zero.identity() for zero in zeros]}) as folder:
            folder.write_shards({"adapter_model.safetensors": tensors}, no_progress)
            config.save_pretrained(folder.partial)
            for file in side_files(Path(config.base_model_name_or_path)):
                folder.copy(file)
            if switch_file(run).is_file():
                folder.copy(switch_file(run))
