"""What saves memory changes nothing that is computed: activation checkpoints, and the optimizer on the host."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.checkpoint.zero import ZeroCheckpoint
from grow.methods.g_freeze import GFreeze
from grow.model.layouts import decoder_mlps
from grow.model.loading import checkpoint_activations, load
from tests.helpers.running import curve, start
from tests.helpers.tiny import ROOT, make_recipe, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("method", "stage", "ranks", "saving"),
    [
        ("g_freeze", 3, 2, {"gradient_checkpointing": True}),
        ("g_freeze", 3, 1, {"deepspeed": str(ROOT / "grow" / "training" / "deepspeed" / "zero3_offload.json")}),
        pytest.param("g_freeze", 2, 2, {"gradient_checkpointing": True}, marks=pytest.mark.full),
        pytest.param("sft", 3, 2, {"gradient_checkpointing": True}, marks=pytest.mark.full),
        pytest.param("lora", 2, 1, {"gradient_checkpointing": True}, marks=pytest.mark.full),
    ],
)
def test_the_same_is_computed(
    text_base: Path, sums: Path, method: str, stage: int, ranks: int, saving: dict[str, Any], tmp_path: Path
) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="2,3")
    found = []
    for name, fields in (("plain", {}), ("saving", saving)):
        (tmp_path / name).mkdir()
        own = {"method": method, "dtype": "float32"} | fields
        start(make_recipe(tmp_path / name / "r.yaml", text_base, tmp_path / "grown", sums, stage, **own), ranks)
        checkpoint = tmp_path / name / "run" / "checkpoint-4"
        trained = {name: value.load() for name, value in ZeroCheckpoint(checkpoint).trained.items()}
        found.append(([entry["loss"] for entry in curve(checkpoint)], trained))
    (losses, weights), (losses_saving, weights_saving) = found
    assert losses_saving == pytest.approx(losses, abs=1e-6) and len(losses) == 4
    assert all((weights_saving[name] - tensor).abs().max() < 1e-6 for name, tensor in weights.items())


def test_only_layers_that_the_gradient_reaches_are_computed_again(text_base: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="2,3")
    model: Any = load(tmp_path / "grown", torch.float32).train()
    GFreeze().prepare(model)
    checkpoint_activations(model)
    runs = dict.fromkeys(range(4), 0)

    def ran(layer: int) -> Any:
        return lambda *_: runs.update({layer: runs[layer] + 1})

    for layer, mlp in decoder_mlps(model).items():
        mlp.register_forward_hook(ran(layer))
    model(input_ids=tokens(), use_cache=False).logits.sum().backward()
    assert runs == {0: 1, 1: 1, 2: 2, 3: 2}
