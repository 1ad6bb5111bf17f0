"""Taken apart and put together: the growth alone, the base alone, α folded in, and the cards that say so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.model.loading import load
from tests.helpers import tiny
from tests.helpers.tiny import folder_checksums, make_base


def logits(path: Path, alpha: float = 1.0) -> torch.Tensor:
    return tiny.logits(load(path, torch.float32, alpha))


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Path:
    """A grown checkpoint whose growth has moved, as training moves it."""
    expand(str(tiny_base), str(tmp_path / "grown"), max_shard_size="10KB")
    assert len(list((tmp_path / "grown").glob("growth-*"))) > 2
    for shard in (tmp_path / "grown").glob("growth-*.safetensors"):
        generator = torch.Generator().manual_seed(len(shard.name))
        tensors = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})
    consolidate(str(tmp_path / "grown"), str(tmp_path / "trained"), format="grown")
    return tmp_path / "trained"


def test_growth_and_attach(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    extract_growth(str(trained), str(tmp_path / "package"))
    assert {file.name.split("-")[0] for file in (tmp_path / "package").iterdir()} == {
        "growth", "growth.json", "README.md",
    }  # fmt: skip
    attach_growth(str(tiny_base), str(tmp_path / "package"), str(tmp_path / "attached"))
    assert torch.equal(logits(tmp_path / "attached"), logits(trained))
    assert not torch.equal(logits(trained), logits(tiny_base))
    extract_base(str(tmp_path / "attached"), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == folder_checksums(tiny_base)


def test_another_base_is_refused(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    extract_growth(str(trained), str(tmp_path / "package"))
    kind = "text" if (tiny_base / "model.safetensors").exists() else "multimodal"
    other = make_base(tmp_path / "other", kind, seed=1)
    with pytest.raises(UserError, match="not the file that this growth grew from"):
        attach_growth(str(other), str(tmp_path / "package"), str(tmp_path / "attached"))
    with pytest.raises(UserError, match="is grown already"):
        attach_growth(str(trained), str(tmp_path / "package"), str(tmp_path / "attached"))
    next((tmp_path / "package").glob("growth-*.safetensors")).unlink()
    with pytest.raises(UserError, match="is one missing"):
        attach_growth(str(tiny_base), str(tmp_path / "package"), str(tmp_path / "attached"))
    assert not list(tmp_path.glob("attached*"))


def test_a_base_that_changed_is_not_handed_out(trained: Path, tmp_path: Path) -> None:
    shard = next(trained.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(UserError, match="not the file that this growth grew from"):
        extract_base(str(trained), str(tmp_path / "again"))


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_the_dial_folded_in_is_the_dial_turned(tiny_base: Path, trained: Path, alpha: float, tmp_path: Path) -> None:
    consolidate(str(trained), str(tmp_path / "stock"), alpha=alpha, dtype="float32")
    assert (logits(tmp_path / "stock") - logits(trained, alpha)).abs().max() < 1e-4
    if alpha == 0:
        assert (logits(tmp_path / "stock") - logits(tiny_base)).abs().max() < 1e-4
    assert all(i.dtype == "F32" for i in Checkpoint(tmp_path / "stock").tensors.values())
    assert load(tmp_path / "stock").dtype == torch.float32


def test_shards_of_a_size(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    consolidate(str(trained), str(tmp_path / "one"))
    consolidate(str(trained), str(tmp_path / "many"), max_shard_size="30KB")
    shards = Checkpoint(tmp_path / "many").shards
    assert len(shards) > 3 and all(file.stat().st_size < 40_000 for file in shards)
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    with pytest.raises(UserError, match="5GB"):
        consolidate(str(trained), str(tmp_path / "none"), max_shard_size="huge")


def test_a_stock_checkpoint_averaged_with_its_base(text_base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "text", seed=1)
    consolidate(str(other), str(tmp_path / "half"), start=str(text_base), alpha=0.5, dtype="float32")
    for name, info in Checkpoint(tmp_path / "half").tensors.items():
        wanted = (Checkpoint(other).read(name).float() + Checkpoint(text_base).read(name).float()) / 2
        assert info.dtype == "F32" and torch.allclose(Checkpoint(tmp_path / "half").read(name), wanted)


def test_cards(tiny_base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_base, tmp_path / "a-model")
    (source / "README.md").write_text("---\nlicense: gemma\nlanguage: [en]\n---\n# A model\n")
    expand(str(source), str(tmp_path / "grown"), layers="0-2")
    scores = {
        part: {"loss": 1.5, "token_accuracy": 0.6, "exact_match": 0.1, "rows": 9} for part in ("task", "retention")
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    consolidate(str(tmp_path / "grown"), str(tmp_path / "stock"), uniform=True, alpha=0.5)
    for folder in ("grown", "stock"):
        text = (tmp_path / folder / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "gemma" and yaml.safe_load(front)["base_model"] == "a-model"
        assert "layers (0-2)" in body or "layers 0-2" in body
    assert "α = 0.5" in (tmp_path / "stock" / "README.md").read_text()
    consolidate(str(tmp_path / "grown"), str(tmp_path / "kept"), format="grown", scores=str(tmp_path / "scores.json"))
    assert "| retention | 1.5000 | 60.0% | 10.0% | 9 |" in (tmp_path / "kept" / "README.md").read_text()
    assert verify(str(tmp_path / "kept"), str(source))["problems"] == []
