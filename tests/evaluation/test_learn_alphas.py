"""An α for each layer: learnt, it does better than one for all; and every command knows it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth, set_layer_alphas
from grow.checkpoint.verify import verify
from grow.data.general_text import general_text
from grow.data.of_recipe import read_sequences
from grow.data.packing import collate
from grow.errors import UserError
from grow.evaluation.learn_alphas import learn_alphas
from grow.methods import read_recipe
from grow.methods.kl import sampled_kl
from grow.model.alpha import set_alpha
from grow.model.grown import grown_mlps
from grow.model.loading import load
from grow.model.loss import labelled_logits, loss_sum
from grow.plan import parse_layers
from tests.helpers.running import consolidate, train
from tests.helpers.tiny import grow, logits, make_recipe

WEIGHT = 3.0


@pytest.fixture(scope="module", params=["g_freeze", pytest.param("g_train", marks=pytest.mark.full)])
def trained(
    text_base: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory, request: Any
) -> Iterator[tuple[Path, Path]]:
    """A recipe, and a grown checkpoint that a few steps have moved."""
    folder = tmp_path_factory.mktemp(request.param)
    expand(str(text_base), str(folder / "grown"), layers="0,1,3")
    recipe = make_recipe(
        folder / "r.yaml", text_base, folder / "grown", sums, 2, method=request.param, max_steps=8, learning_rate=2e-2
    )
    train(recipe, 1)
    consolidate(str(folder / "run"), str(folder / "trained"), "grown")
    yield recipe, folder / "trained"


def objective(path: Path, recipe: Path, text: Path, alpha: float) -> float:
    """What is minimised, over all validation rows and all of the text."""
    model, settings = load(path, torch.float32, alpha), read_recipe(str(recipe))
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = read_sequences(settings, tokenizer, "validation")
    found = labels = kl = 0.0
    with torch.no_grad():
        for sequence in task:  # type: ignore[attr-defined]
            now, wanted = labelled_logits(model, collate([sequence]))
            found, labels = found + loss_sum(now, wanted).item(), labels + len(wanted)
        (general,) = general_text([str(text)], settings.max_length, tokenizer, 0).folders
        for sequence in general:  # type: ignore[attr-defined]
            kl += sampled_kl(model, collate([sequence])).item() / len(general)
    return found / labels + WEIGHT * kl


def test_learnt_it_does_better_than_one_for_all(trained: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    recipe, path = trained
    said = learn_alphas(str(path), str(tmp_path / "out"), read_recipe(str(recipe)), [str(text)], WEIGHT, 60)
    assert len(set(said["alphas"])) > 1 and said["layers"] == [0, 1, 3]
    at = [objective(path, recipe, text, tenth / 10) for tenth in range(11)]
    assert objective(tmp_path / "out", recipe, text, 1) < min(at) - 1e-3


def test_every_command_knows_it(trained: tuple[Path, Path], text_base: Path, tmp_path: Path) -> None:
    _, path = trained
    out, alphas = tmp_path / "out", [1.0, 0.25, 0.625]
    set_layer_alphas(str(path), str(out), alphas)
    assert parse_layers(f"top:2:{out}", 4) == (0, 3) and parse_layers(f"bottom:1:{out}", 4) == (1,)
    with pytest.raises(UserError, match="learn-alphas"):
        parse_layers(f"top:2:{path}", 4)
    for shard in path.glob("*.safetensors"):
        assert (out / shard.name).samefile(shard), "nothing is copied"
    assert verify(str(out), str(text_base))["problems"] == []

    model: Any = load(out, torch.float32)
    expected = load(path, torch.float32)
    for mlp, alpha in zip(grown_mlps(expected), alphas, strict=True):
        mlp.alpha = alpha
    assert torch.equal(logits(model), logits(expected))
    set_alpha(model, 0)
    assert torch.equal(logits(model), logits(load(text_base, torch.float32))), "and at 0 it is the base, exactly"

    # Folded into a stock checkpoint, together with an α for all.
    set_alpha(model, 0.5)
    assert [mlp.alpha for mlp in grown_mlps(model)] == [alpha / 2 for alpha in alphas]
    consolidate(str(out), str(tmp_path / "stock"), uniform=True, alpha=0.5, dtype="float32")
    assert torch.allclose(logits(load(tmp_path / "stock")), logits(model), atol=1e-4)
    assert "0.625" in (tmp_path / "stock" / "README.md").read_text()

    # Taken apart and put together, it is the same; and the base comes out.
    extract_growth(str(out), str(tmp_path / "package"))
    attach_growth(str(text_base), str(tmp_path / "package"), str(tmp_path / "again"))
    assert torch.equal(logits(load(tmp_path / "again", torch.float32)), logits(load(out, torch.float32)))
    extract_base(str(out), str(tmp_path / "base"))
    assert (tmp_path / "base" / "config.json").read_bytes() == (text_base / "config.json").read_bytes()


def test_mistakes(trained: tuple[Path, Path], text_base: Path, text: Path, tmp_path: Path) -> None:
    recipe, path = trained
    for alphas in ([0.5], [0.5, 0.5, 1.5], [0.5, 0.5, float("nan")]):
        with pytest.raises(UserError, match="layers that make sense"):
            set_layer_alphas(str(path), str(tmp_path / "out"), alphas)
    for words, message in (
        ([text_base, tmp_path / "out", "--text", text], "not grown"),
        ([path, path, "--text", text], "already there"),
        ([path, tmp_path / "out", "--text", text, "--kl-weight", "0"], "more than 0"),
        ([path, tmp_path / "out", "--text", tmp_path / "none"], "none"),
    ):
        error = grow("learn-alphas", *words, "--recipe", recipe, code=2).stderr
        assert error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("out*"))
