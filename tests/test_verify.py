"""verify finds what is wrong, and names it."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grow.checkpoint.expand import expand
from grow.checkpoint.verify import verify


@pytest.fixture
def grown(tiny_base: Path, tmp_path: Path) -> Path:
    expand(str(tiny_base), str(tmp_path / "grown"), layers="0,2")
    return tmp_path / "grown"


def test_sound(tiny_base: Path, grown: Path) -> None:
    assert verify(str(grown), str(tiny_base))["problems"] == []


def test_one_flipped_bit_of_growth(grown: Path) -> None:
    shard = grown / "growth-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    (problem,) = verify(str(grown))["problems"]
    assert "layers.2.mlp.grown.down_proj.weight" in problem and "checksum" in problem


def test_one_flipped_bit_of_the_base(tiny_base: Path, grown: Path) -> None:
    shard = next(grown.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.unlink()  # it is the base's own file: write beside it, not into it
    shard.write_bytes(data)
    problems = verify(str(grown), str(tiny_base))["problems"]
    assert any("checksum" in problem and shard.name in problem for problem in problems)
    assert any("differs from the base's" in problem for problem in problems)


def test_copies_that_are_no_copies(grown: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Growth of another base, checksums and all, under this base's name."""
    from tests.tiny import make_base

    kind = "text" if (tiny_base / "model.safetensors").exists() else "multimodal"
    expand(str(make_base(tmp_path / "other", kind, seed=1)), str(tmp_path / "stranger"), layers="0,2")
    for shard in grown.glob("model-*.safetensors"):
        (tmp_path / "stranger" / shard.name).unlink()
        shutil.copy(shard, tmp_path / "stranger" / shard.name)
    problems = verify(str(tmp_path / "stranger"), str(tiny_base))["problems"]
    assert sum("is not the copy of the base" in problem for problem in problems) == 6


def test_nan(text_base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(text_base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (problem,) = verify(str(broken))["problems"]
    assert "model.norm.weight" in problem and "finite" in problem
