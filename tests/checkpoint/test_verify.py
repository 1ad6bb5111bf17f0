"""verify finds what is wrong, and names it."""

import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grow.checkpoint.expand import expand
from grow.checkpoint.shards import read_header
from grow.checkpoint.verify import verify
from grow.errors import UserError
from tests.helpers.checkpoints import write_base


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
    from tests.helpers.tiny import make_base

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


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small grown checkpoint that shares no file with its base."""
    folder = tmp_path_factory.mktemp("flips")
    expand(str(write_base(folder / "base")), str(folder / "linked"))
    return shutil.copytree(folder / "linked", folder / "grown")


def said_of(grown: Path) -> str:
    try:
        return "; ".join(verify(str(grown))["problems"])
    except UserError as error:
        return str(error)


def flip(file: Path, byte: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(byte)
        (value,) = opened.read(1)
        opened.seek(byte)
        opened.write(bytes([value ^ 1 << bit]))


def check_flip(grown: Path, file: Path, byte: int, bit: int) -> None:
    """What is found names the tensor whose byte it is, or else the file."""
    named = file.name
    if file.suffix == ".safetensors":
        within = (name for name, i in read_header(file).items() if i.offset <= byte < i.offset + i.nbytes)
        named = next(within, file.name)
    flip(file, byte, bit)
    said = said_of(grown)
    flip(file, byte, bit)
    assert named in said, f"bit {bit} of byte {byte} of {file.name}: {said or 'nothing was found'}"


def files_with_checksums(grown: Path) -> list[Path]:
    files = sorted(file for file in grown.rglob("*") if file.is_file() and file != grown / "README.md")
    assert {"config.json", "growth.json", "tokenizer.json", "model.safetensors.index.json"} <= {f.name for f in files}
    return files


def test_one_flipped_bit_of_any_file_is_found_and_named(by_hand: Path) -> None:
    chance = random.Random(0)
    for file in files_with_checksums(by_hand):
        for _ in range(25):
            check_flip(by_hand, file, chance.randrange(file.stat().st_size), chance.randrange(8))
        if file.suffix == ".safetensors":  # what no reader looks at
            check_flip(by_hand, file, file.read_bytes().index(b'"pt"') + 1, 0)
    assert said_of(by_hand) == ""


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_each_byte_of_each_file(by_hand: Path) -> None:
    files = files_with_checksums(by_hand)
    for file in files:
        for byte in range(file.stat().st_size):
            check_flip(by_hand, file, byte, byte % 8)
    print(f"{sum(file.stat().st_size for file in files)} bytes of {len(files)} files")
    assert said_of(by_hand) == ""


def test_a_missing_file_is_named(by_hand: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "base/config.json", "growth.json", "growth-00001-of-00001.safetensors"):
        broken = shutil.copytree(by_hand, tmp_path / "broken")
        (broken / name).unlink()
        assert name in said_of(broken)
        shutil.rmtree(broken)


def test_a_card_may_be_edited(by_hand: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(by_hand, tmp_path / "edited")
    (edited / "README.md").write_text("mine")
    assert said_of(edited) == ""
