"""G-Train and G-LoRA: what of the growth trains, exact at step 0, and how it comes out again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grow.checkpoint.expand import expand
from grow.checkpoint.metadata import read_growth
from grow.checkpoint.package import attach_growth, extract_base
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.verify import verify
from grow.methods.g_lora import GLora
from grow.methods.g_train import GTrain
from grow.model.grown import grown_mlps
from grow.model.loading import load
from tests.helpers.running import consolidate, here, train_and_resume
from tests.helpers.tiny import folder_checksums, logits, make_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    [
        (2, 1, "float32"),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.full),
        pytest.param(3, 2, "float32", marks=pytest.mark.full),
    ],
)
def test_g_train(text_base: Path, sums: Path, stage: int, ranks: int, dtype: str, tmp_path: Path) -> None:
    grown, folder = tmp_path / "grown", tmp_path / "run"
    expand(str(text_base), str(grown), layers="1,2")
    # Without weight decay, so that what changes has a gradient.
    fields = {"method": "g_train", "dtype": dtype, "weight_decay": 0.0}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, grown, sums, stage, **fields)
    trained = train_and_resume(recipe, ranks)
    expected = {name.replace(".grown.", ".trained.") for name in Checkpoint(grown).tensors if ".grown." in name}
    expected = {name for name in expected if "down_proj" not in name}
    expected |= {name for name in Checkpoint(grown).tensors if ".grown." in name}
    assert trained.keys() == expected and len(expected) == 2 * 5
    for name, tensor in trained.items():
        own = load_file(text_base / "model.safetensors")[name.replace(".grown.", ".").replace(".trained.", ".")]
        assert not torch.equal(tensor, own.float() / (2 if "down_proj" in name else 1)), "each of them changed"

    # Grown again, packaged, and on its base again: the trained up-projections come along, and the base stays whole.
    consolidate(str(folder), str(tmp_path / "trained"), "grown")
    attach_growth(str(text_base), str(folder / "result"), str(tmp_path / "attached"))
    for path in (tmp_path / "trained", tmp_path / "attached"):
        assert verify(str(path), str(text_base))["problems"] == []
        assert torch.equal(logits(load(path, torch.float32, alpha=0)), logits(load(text_base, torch.float32)))
    extract_base(str(tmp_path / "trained"), str(tmp_path / "base"))
    assert folder_checksums(tmp_path / "base") == folder_checksums(text_base)
    model = load(tmp_path / "trained", torch.float32)
    assert torch.equal(logits(load(tmp_path / "attached", torch.float32)), logits(model))
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16().float())

    # Stock, as trained and at other α.
    for alpha in (1, 0.4):
        stock = tmp_path / f"{alpha}"
        consolidate(str(folder), str(stock), uniform=True, alpha=alpha, dtype="float32")
        expected_logits = logits(g_train_model(grown, trained, alpha))
        assert (logits(load(stock)) - expected_logits).abs().max() < 1e-4
        assert (logits(load(text_base, torch.float32)) - expected_logits).abs().max() > 1e-2


def g_train_model(grown: Path, trained: dict[str, torch.Tensor], alpha: float) -> Any:
    """The model in training, made by hand from its master weights."""
    model = load(grown, torch.float32, alpha)
    GTrain().prepare(model)
    assert not model.load_state_dict(trained, strict=False).unexpected_keys
    return model


def test_g_train_is_exact_at_step_0_and_its_dial_ends_where_it_should(tiny_base: Path, tmp_path: Path) -> None:
    expand(str(tiny_base), str(tmp_path / "grown"))
    for dtype in (torch.float32, torch.bfloat16):
        expected = logits(load(tiny_base, dtype))
        model: Any = load(tmp_path / "grown", dtype)
        GTrain().prepare(model)
        assert all(mlp.trained is not None for mlp in grown_mlps(model))
        assert torch.equal(logits(model), expected)
        mlp = next(grown_mlps(model))
        mlp.trained.gate_proj.weight.data += 0.1
        assert not torch.equal(logits(model), expected)
        mlp.alpha = 0
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.full)])
def test_g_lora(text_base: Path, sums: Path, stage: int, ranks: int, tmp_path: Path) -> None:
    grown, folder = tmp_path / "grown", tmp_path / "run"
    expand(str(text_base), str(grown), layers="1,2")
    fields = {"method": "g_lora", "dtype": "float32", "lora_rank": 4, "learning_rate": 1e-2}
    trained = train_and_resume(make_recipe(tmp_path / "r.yaml", text_base, grown, sums, stage, **fields), ranks)
    copies = {name.removesuffix(".weight") for name in Checkpoint(grown).tensors if ".grown." in name}
    assert {name.partition(".lora_")[0] for name in trained} == copies and len(trained) == 2 * len(copies) == 12

    # It ends in a growth package; α = 0 is the base.
    attach_growth(str(text_base), str(folder / "result"), str(tmp_path / "attached"))
    assert verify(str(tmp_path / "attached"), str(text_base))["problems"] == []
    base_logits = logits(load(text_base, torch.float32))
    assert torch.equal(logits(load(tmp_path / "attached", torch.float32, alpha=0)), base_logits)

    # The stock checkpoint computes what the model in training does; the update of each copy has rank 4.
    consolidate(str(folder), str(tmp_path / "stock"), uniform=True, dtype="float32")
    model: Any = load(grown, torch.float32)
    GLora(lora_rank=4).prepare(model)
    assert torch.equal(logits(model), base_logits), "exact at step 0"
    assert not model.load_state_dict(trained, strict=False).unexpected_keys
    stock, started = load(tmp_path / "stock"), load(grown, torch.float32)
    assert (logits(stock) - logits(model)).abs().max() < 1e-4
    assert (base_logits - logits(model)).abs().max() > 1e-2
    for name in copies:
        start = started.get_parameter(f"{name}.weight")
        weight = stock.get_parameter(f"{name.replace('.grown', '')}.weight")
        copy = weight[:, -start.shape[1] :] if "down_proj" in name else weight[-start.shape[0] :]
        assert torch.linalg.matrix_rank(copy - start, rtol=1e-4) == 4


@pytest.mark.parametrize("method", ["g_freeze", "g_train"])
def test_some_matrices_of_the_copies(
    method: str, text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """gate and up alone: the copy of down stays half of the base's, and goes with the growth all the same."""
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    fields = {"method": method, "grown_matrices": ["gate_proj", "up_proj"]}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, **fields)
    weights = train_and_resume(recipe, 1)
    kinds = {"grown"} | ({"trained"} if method == "g_train" else set())
    assert {tuple(name.split(".")[4:6]) for name in weights} == {
        (kind, part) for kind in kinds for part in ("gate_proj", "up_proj")
    }
    package, start = read_growth(tmp_path / "run" / "result"), read_growth(tmp_path / "grown")
    same = {name for name, sums in start["tensors"].items() if package["tensors"].get(name) == sums}
    assert same == {name for name in start["tensors"] if "down_proj" in name}
    wrong = here(capsys, "train", recipe, "--check", "--grown_matrices", "q_proj", "--output_dir", tmp_path, code=2)
    assert "grown_matrices: q_proj is not a matrix" in wrong
    wrong = here(capsys, "train", recipe, "--check", "--method", "g_lora", "--output_dir", tmp_path / "x", code=2)
    assert "has its LoRAs in lora_targets" in wrong
