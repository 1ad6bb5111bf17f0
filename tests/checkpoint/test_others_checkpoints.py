"""Checkpoints as others save them: taken as transformers takes them, or one line that says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import extract_base as take_out
from grow.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Checkpoint
from grow.checkpoint.starting import check_start
from grow.errors import UserError
from tests.helpers.running import here
from tests.helpers.tiny import folder_checksums, logits, make_base, make_recipe

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def with_tensors(path: Path, **tensors: torch.Tensor | None) -> None:
    """Other tensors in a base of one file; None takes one out."""
    held = load_file(path / SINGLE_NAME) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({n: t for n, t in held.items() if t is not None}, path / SINGLE_NAME, metadata={"format": "pt"})


def with_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def with_generation(path: Path) -> None:
    (path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 0}))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no class in its config": (lambda path: with_config(path, architectures=None), "names no class"),
    "a class without a head": (lambda path: with_config(path, architectures=["Gemma3TextModel"]), "writes no text"),
    "a class of its own code": (
        lambda path: with_config(path, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}),
        "not one that transformers reads",
    ),
    "quantized": (lambda path: with_config(path, quantization_config={"quant_method": "fp8"}), "are quantized"),
    "settings for writing that are none": (with_generation, "refuses its generation_config.json"),
    "more tokens in the config": (lambda path: with_config(path, vocab_size=512), "is [320, 32], its config says [512"),
    "a tensor is missing": (
        lambda path: with_tensors(path, model__layers__1__self_attn__k_proj__weight=None),
        "self_attn.k_proj.weight is missing",
    ),
    "an adapter beside": (lambda path: (path / "adapter_config.json").write_text("{}"), "move adapter_config.json"),
    "a head of its own": (
        lambda path: with_tensors(path, lm_head__weight=torch.ones(320, 32, dtype=torch.bfloat16)),
        "set tie_word_embeddings to false",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_trained(
    kind: str, text_base: Path, sums: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoil, says = WRONG[kind]
    shutil.copytree(text_base, tmp_path / "base")
    spoil(tmp_path / "base")
    path = make_recipe(tmp_path / "r.yaml", tmp_path / "base", tmp_path / "grown", sums, 2, method="sft")
    assert says in here(capsys, "train", path, "--check", code=2)


def test_a_head_that_is_the_embeddings_is_trained_with_them(text_base: Path, tmp_path: Path) -> None:
    """Under both names, though whoever trained it saved but one."""
    shutil.copytree(text_base, tmp_path / "base")
    own = load_file(text_base / SINGLE_NAME)
    with_tensors(tmp_path / "base", lm_head__weight=own[EMBEDDINGS].clone())
    shutil.copytree(text_base, tmp_path / "trained")
    with_tensors(tmp_path / "trained", **{EMBEDDINGS.replace(".", "__"): own[EMBEDDINGS] * 2})
    consolidate(str(tmp_path / "trained"), str(tmp_path / "stock"), start=str(tmp_path / "base"))
    stock = load_file(tmp_path / "stock" / SINGLE_NAME)
    assert torch.equal(stock[EMBEDDINGS], own[EMBEDDINGS] * 2) and torch.equal(stock[HEAD], stock[EMBEDDINGS])
    consolidate(str(tmp_path / "trained"), str(tmp_path / "half"), start=str(tmp_path / "base"), alpha=0.5)
    half = load_file(tmp_path / "half" / SINGLE_NAME)
    assert torch.equal(half[HEAD], half[EMBEDDINGS]) and not torch.equal(half[HEAD], own[EMBEDDINGS])


def test_a_multimodal_config_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """By its top level: that of its text says nothing of the head."""
    path = make_base(tmp_path / "base", "multimodal")
    config = json.loads((path / "config.json").read_text())
    index = json.loads((path / INDEX_NAME).read_text())
    name = next(name for name in index["weight_map"] if "embed_tokens" in name)
    file = path / index["weight_map"][name]
    save_file(load_file(file) | {"language_model.lm_head.weight": torch.ones(320, 32)}, file, metadata={"format": "pt"})
    index["weight_map"]["language_model.lm_head.weight"] = file.name
    (path / INDEX_NAME).write_text(json.dumps(index))
    with_config(path, text_config=config["text_config"] | {"tie_word_embeddings": False})
    with pytest.raises(UserError, match="at the top of its config"):
        check_start(Checkpoint(path))
    with_config(path, tie_word_embeddings=False)
    check_start(Checkpoint(path))
    model = transformers.AutoModelForImageTextToText.from_pretrained(path)
    assert model.get_output_embeddings().weight.eq(1).all(), "and so does transformers"


def test_one_file_goes_before_left_over_shards(text_base: Path, tmp_path: Path) -> None:
    """As in transformers; other formats beside it play no part, and are not carried along."""
    base = tmp_path / "base"
    shutil.copytree(text_base, base)
    other = load_file(make_base(tmp_path / "other", "text", seed=3) / SINGLE_NAME)
    save_file(other, base / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "model-00001-of-00002.safetensors", base / "consolidated.safetensors")
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(other, "model-00001-of-00002.safetensors")}))
    (base / "pytorch_model.bin").write_bytes(b"of long ago")
    expand(str(base), str(tmp_path / "grown"))
    consolidate(str(tmp_path / "grown"), str(tmp_path / "stock"), alpha=0)
    stock, loaded = (transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / name) for name in ("stock", "base"))
    assert torch.equal(logits(stock), logits(loaded))
    take_out(str(tmp_path / "grown"), str(tmp_path / "again"))
    expected = folder_checksums(text_base)
    assert {name: sum_ for name, sum_ in folder_checksums(tmp_path / "again").items() if name in expected} == expected
    assert not list((tmp_path / "again").glob("*.bin")) and not (tmp_path / "again" / INDEX_NAME).exists()
