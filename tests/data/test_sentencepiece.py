"""A base whose tokenizer is a SentencePiece model alone, as older downloads have it, goes the whole way round."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from grow.checkpoint.expand import expand
from grow.evaluation.evaluate import evaluate
from grow.methods import read_recipe
from tests.helpers.running import consolidate, curve, start
from tests.helpers.tiny import make_base, make_recipe

SPECIAL = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}  # Gemma's


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = make_base(tmp_path / "base", "text")
    for file in path.glob("tokenizer*"):
        file.unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"{a}+{b}={a + b} two  spaces" for a in range(30) for b in range(30)),
        model_writer=model,
        vocab_size=300, hard_vocab_limit=False, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        **{f"{name}_id": place for name, place in SPECIAL.items()},
        **{f"{name}_piece": f"<{name}>" for name in SPECIAL},
    )  # fmt: skip
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}])
def test_tokens_are_sentencepieces(base: Path, config: dict[str, object] | None) -> None:
    if config:
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    assert {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL} == SPECIAL
    for text in ("12+7=", "  two  spaces, é\n"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == pieces.encode(text) and tokenizer.decode(ids) == text


def test_trained_and_scored(base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(base), str(tmp_path / "grown"))
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path / "grown", sums, 2)
    start(recipe, 1)
    assert len(curve(tmp_path / "run" / "checkpoint-4")) == 4
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"))
    for path in (tmp_path / "grown", tmp_path / "stock"):
        assert (path / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
        scores = evaluate(str(path), read_recipe(str(recipe)), samples=1)
        assert scores["task"]["rows"] > 0 and len(scores["samples"]) == 1
