"""Each method: exactly what it names trains, it learns, it resumes in the same bits, and it comes out again."""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach, base
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.verify import verify
from grow.checkpoint.zero import ZeroCheckpoint
from grow.cli import main
from grow.methods.g_train import GTrain
from grow.model import grown_mlps, load
from tests.tiny import file_checksum, folder_checksums, make_data, make_recipe, run, tokens


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "sums")


# Processes that are forked from one with the imports done: a run takes two seconds instead of ten.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["deepspeed", "transformers.trainer", "datasets", "peft"])


def train(recipe: Path, ranks: int) -> str:
    """Trains; returns what was printed."""
    if ranks > 1:
        return run("launch/train.sh", recipe, NPROC=str(ranks)).stdout
    output = recipe.with_suffix(".out")
    process = FORKED.Process(target=train_here, args=(recipe, output))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()[-3000:]
    return output.read_text()


def train_here(recipe: Path, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        sys.exit(main(["train", str(recipe)]))


def train_and_resume(recipe: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Trains, trains again from the middle, and compares; returns what trained, fp32."""
    folder = Path(yaml.safe_load(recipe.read_text())["output_dir"])
    train(recipe, ranks)
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.1, "it learns"
    first = {name: value.load() for name, value in ZeroCheckpoint(folder / "checkpoint-4").trained.items()}
    result = folder_checksums(folder / "result") if (folder / "result").exists() else {}
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "COMPLETE").unlink()
    assert train(recipe, ranks).count("{'loss'") == 2, "steps 3 and 4 are done again, and no others"
    again = {name: value.load() for name, value in ZeroCheckpoint(folder / "checkpoint-4").trained.items()}
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert {n: c for n, c in result.items() if n.endswith("tensors")} == (
        {n: file_checksum(folder / "result" / n) for n in result if n.endswith("tensors")}
    )
    return first


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    [
        (2, 1, "float32"),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.full),
        pytest.param(3, 2, "float32", marks=pytest.mark.full),
    ],
)
def test_g_train(text_base: Path, data: Path, stage: int, ranks: int, dtype: str, tmp_path: Path) -> None:
    grown, folder = tmp_path / "grown", tmp_path / "run"
    expand(str(text_base), str(grown), layers="1,2")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, grown, data, stage, method="g_train", dtype=dtype)
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
    attach(str(text_base), str(folder / "result"), str(tmp_path / "attached"))
    for path in (tmp_path / "trained", tmp_path / "attached"):
        assert verify(str(path), str(text_base))["problems"] == []
        assert torch.equal(logits(load(path, torch.float32, alpha=0)), logits(load(text_base, torch.float32)))
    base(str(tmp_path / "trained"), str(tmp_path / "base"))
    assert folder_checksums(tmp_path / "base") == folder_checksums(text_base)
    model = load(tmp_path / "trained", torch.float32)
    assert torch.equal(logits(load(tmp_path / "attached", torch.float32)), logits(model))
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16().float())

    # Stock, as trained and along the dial.
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
