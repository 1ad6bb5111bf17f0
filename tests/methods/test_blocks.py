"""Copies of whole layers: they add nothing at first, train alone, and the deeper model is a stock one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from grow.errors import UserError
from grow.methods.baselines.blocks import Blocks, period
from grow.model.loading import load
from tests.checkpoint.test_architectures import make
from tests.helpers.running import consolidate, train_and_resume
from tests.helpers.tiny import TEXT_CONFIG, logits, make_recipe, make_tokenizer

pytestmark = pytest.mark.gpu


def make_gemma(path: Path) -> Path:
    """Eight layers: twice two with a window and one without, and two more."""
    torch.manual_seed(0)
    kinds = (["sliding_attention"] * 2 + ["full_attention"]) * 3
    config = transformers.Gemma3TextConfig(**TEXT_CONFIG | {"num_hidden_layers": 8, "layer_types": kinds[:8]})
    model = transformers.Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(path)
    return path


def made(tmp_path: Path, kind: str) -> Path:
    return make_gemma(tmp_path / "base") if kind == "gemma3" else make(tmp_path / "base", kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "llama", "qwen3", "phi", "gemma4", "glm4"])
def test_nothing_is_added_at_first(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if kind in ("phi", "gemma4", "glm4"):
        with pytest.raises(UserError, match=r"blocks: .*DecoderLayer: how its copies could add nothing"):
            Blocks().prepare(load(made(tmp_path, kind)))
        return
    model = load(made(tmp_path, kind), dtype)
    before, count = logits(model), sum(1 for _ in model.parameters())
    Blocks().prepare(model)
    assert torch.equal(logits(model), before) and sum(1 for _ in model.parameters()) > 1.5 * count


def test_groups_follow_the_pattern() -> None:
    gemma = ["sliding"] * 5 + ["full"]
    assert period(gemma * 3) == 6 and period((gemma * 5)[:26]) == 6 and period(["full"] * 4) == 1


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_it_learns_and_is_stock_again(kind: str, sums: Path, tmp_path: Path) -> None:
    base = made(tmp_path, kind)
    make_tokenizer(base)
    if kind == "gemma3":  # as on the hub, where the pattern stands for the kinds of layers
        config = json.loads((base / "config.json").read_text())
        assert config.pop("layer_types")[:3] == ["sliding_attention", "sliding_attention", "full_attention"]
        (base / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 3}))
    fields: dict[str, Any] = {"method": "blocks", "dtype": "float32", "learning_rate": 5e-2}
    recipe = make_recipe(tmp_path / "r.yaml", base, base, sums, 1, **fields)
    trained = train_and_resume(recipe, 1)
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"), dtype="float32")
    model: Any = load(base, torch.float32)
    Blocks().prepare(model)
    own = dict(model.named_parameters())
    assert set(trained) == {name for name, parameter in own.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, values in trained.items():
            own[name].copy_(values)
    cls = type(load(base))
    stock, info = cls.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock.eval()), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits(model), logits(load(base, torch.float32)))
    if kind == "gemma3":
        types = stock.config.layer_types
        assert len(types) == 14 and types == (["sliding_attention"] * 2 + ["full_attention"]) * 4 + types[-2:]
    with pytest.raises(UserError, match="the base has no"):
        consolidate(str(tmp_path / "run"), str(tmp_path / "half"), alpha=0.5)
