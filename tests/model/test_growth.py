"""Growth changes nothing: the grown model's logits are the base's, bit for bit. And the check bites."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.dtypes import scale
from grow.checkpoint.expand import expand
from grow.checkpoint.shards import Checkpoint
from grow.errors import UserError
from grow.evaluation.logits import TEXT, compare_logits
from grow.model.grown import grown_mlps
from grow.model.loading import load
from grow.plan import parse_layers
from tests.helpers.tiny import folder_checksums, logits, tokens


def differences(path: Path, base: Path, device: str) -> dict[str, float]:
    return {name: found["difference"] for name, found in compare_logits(str(path), str(base), device).items()}


EXACT = {"float32": 0.0, "bfloat16": 0.0}


@pytest.fixture(scope="module")
def single_file_base(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base, in one file."""
    folder = tmp_path_factory.mktemp("single")
    tensors = {}
    for shard in real_base.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((real_base / name).read_bytes())
    return folder


def test_every_bfloat16_is_halved_as_torch_does_it() -> None:
    """A block for each sign and exponent, since zeros, subnormals and NaN are halved in their own way."""
    for bits in np.arange(2**16, dtype=np.uint16).reshape(512, 128):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            made = scale(bits, "BF16", 0.5)
        halved, expected = (torch.from_numpy(b.copy()).view(torch.bfloat16) for b in (made, bits))
        assert torch.equal(halved.nan_to_num(7), (expected * 0.5).nan_to_num(7))
        assert torch.equal(halved.signbit(), expected.signbit()) or expected.isnan().any()


@pytest.mark.gpu
def test_real_model_all_layers_from_shards(real_base: Path, device: str, tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(real_base)(TEXT, return_tensors="pt").input_ids.shape[1] >= 200
    expand(str(real_base), str(tmp_path / "grown"))
    assert differences(tmp_path / "grown", real_base, device) == EXACT


@pytest.mark.gpu
def test_real_model_some_layers_from_one_file(single_file_base: Path, device: str, tmp_path: Path) -> None:
    expand(str(single_file_base), str(tmp_path / "grown"), layers="0,5,9-11")
    assert not (tmp_path / "grown" / "model.safetensors").exists(), "transformers would ignore the index beside it"
    assert differences(tmp_path / "grown", single_file_base, device) == EXACT


@pytest.mark.gpu
@pytest.mark.parametrize("layers", ["all", "1,3"])
def test_both_classes(tiny_base: Path, layers: str, device: str, tmp_path: Path) -> None:
    expand(str(tiny_base), str(tmp_path / "grown"), layers=layers)
    for dtype in (torch.float32, torch.bfloat16):
        base, grown = (load(path, dtype).to(device) for path in (tiny_base, tmp_path / "grown"))
        assert len(list(grown_mlps(grown))) == len(parse_layers(layers, 4))
        for count in (1, 40, 250):
            text = {"input_ids": tokens(count).to(device)}
            assert torch.equal(logits(grown, **text), logits(base, **text))
        # One weight of the growth, a little off, and the logits are not the same any more.
        next(grown_mlps(grown)).grown.up_proj.weight.data[0, 0] += 0.5
        assert not torch.equal(logits(grown, **text), logits(base, **text))


def test_a_missing_tensor_is_an_error(text_base: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    expand(str(text_base), str(grown))
    shard = grown / "growth-00001-of-00001.safetensors"
    tensors = load_file(shard)
    dropped = tensors.pop("model.layers.2.mlp.grown.down_proj.weight")
    assert dropped.shape == (32, 48)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.grown\.down_proj"):
        load(grown)
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.grown\.down_proj"):
        Checkpoint(grown)


def test_base_files_are_linked_not_copied(tiny_base: Path, tmp_path: Path) -> None:
    expand(str(tiny_base), str(tmp_path / "grown"))
    for shard in Checkpoint(tiny_base).shards:
        linked = [file for file in (tmp_path / "grown").iterdir() if file.samefile(shard)]
        assert len(linked) == 1 and linked[0].name.startswith("model-")


@pytest.mark.parametrize("factor", [3, 4])
def test_larger_factors_are_close_and_their_copies_differ(text_base: Path, factor: int, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), factor=factor)
    base, grown = load(text_base, torch.float32), load(tmp_path / "grown", torch.float32)
    down = next(grown_mlps(grown)).grown.down_proj.weight
    copies = down.view(down.shape[0], factor - 1, -1)
    assert (copies[:, 0] != copies[:, 1]).float().mean() > 0.5
    with torch.no_grad():
        difference = (grown(input_ids=tokens()).logits - base(input_ids=tokens()).logits).abs().max()
    # The perturbations sum to zero only up to bf16's rounding of each copy.
    assert 0 < difference < 0.05 * base(input_ids=tokens()).logits.abs().max()


def test_some_layers_to_stock_by_padding(text_base: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,3")
    with pytest.raises(UserError, match="--uniform"):
        consolidate(str(tmp_path / "grown"), str(tmp_path / "stock"))
    assert not (tmp_path / "stock").exists()
    consolidate(str(tmp_path / "grown"), str(tmp_path / "stock"), uniform=True)
    with torch.no_grad():
        difference = (
            load(tmp_path / "stock", torch.float32)(input_ids=tokens()).logits
            - load(text_base, torch.float32)(input_ids=tokens()).logits
        )
    assert difference.abs().max() < 1e-4


def test_generate_works_on_a_grown_checkpoint(text_base: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"))
    written = [
        load(path, torch.float32).generate(input_ids=tokens(10), max_new_tokens=8, do_sample=False)
        for path in (text_base, tmp_path / "grown")
    ]
    assert torch.equal(*written)


def test_undisturbed_and_interrupted_expansions_agree(text_base: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "whole"))
    seen: list[int] = []

    def stop_midway(count: int, total: int) -> None:
        seen.append(count)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        expand(str(text_base), str(tmp_path / "grown"), progress=stop_midway)
    assert not (tmp_path / "grown").exists()
    expand(str(text_base), str(tmp_path / "grown"))
    assert folder_checksums(tmp_path / "whole") == folder_checksums(tmp_path / "grown")
