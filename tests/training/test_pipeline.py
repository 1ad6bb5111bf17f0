"""The whole chain, under two ranks, with the scripts that a user runs: expand, train, resume, consolidate, load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from grow.checkpoint.expand import expand
from grow.checkpoint.zero import ZeroCheckpoint
from grow.model.loading import load
from tests.helpers.tiny import file_checksum, grow, logits, make_data, make_recipe, run, step_lines


@pytest.mark.parametrize(
    ("tiny_base", "stage"),
    [
        ("text", 2),
        ("multimodal", 3),
        *(pytest.param(*p, marks=pytest.mark.full) for p in (("text", 3), ("multimodal", 2))),
    ],
    indirect=["tiny_base"],
)
def test_expand_train_resume_consolidate_load(tiny_base: Path, stage: int, tmp_path: Path) -> None:
    grown, work = tmp_path / "grown", tmp_path / "with a space"
    expand(str(tiny_base), str(grown))
    work.mkdir()
    recipe = make_recipe(work / "recipe.yaml", tiny_base, grown, make_data(tmp_path / "data"), stage)
    run("launch/train.sh", recipe, NPROC="2", TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"), CXX="false")
    assert not (tmp_path / "compiled").exists(), "nothing is compiled, so no compiler is needed and no lock can be left"

    # The checkpoint holds what trained, and no more: no frozen tensor, no tied head.
    result = json.loads((work / "run" / "COMPLETE").read_text())
    zero = ZeroCheckpoint(work / "run" / "checkpoint-4")
    assert (zero.stage, zero.world_size) == (stage, 2)
    assert zero.trained and all(".mlp.grown." in name for name in zero.trained)
    for file in (work / "run").glob("checkpoint-4/global_step4/*_model_states.pt"):
        state = torch.load(file, weights_only=True)
        assert set(state["module"]) == set(zero.trained)
        assert not state["frozen_param_fragments"]
    # And what was frozen is the base's in the memory of every rank.
    base_count = len(list(load(tiny_base).parameters()))
    assert result["frozen_unchanged"] == base_count

    # Resumed from step 2, it ends in the same weights, bit for bit.
    grow("consolidate", work / "run", work / "stock")
    shutil.rmtree(work / "run" / "checkpoint-4")
    (work / "run" / "COMPLETE").unlink()
    again = run("launch/train.sh", recipe, NPROC="2")
    assert len(step_lines(again.stdout)) == 2, "steps 3 and 4 were done again, and no others"
    grow("consolidate", work / "run", work / "resumed")
    for file in (work / "stock").glob("*.safetensors"):
        assert file_checksum(file) == file_checksum(work / "resumed" / file.name)

    # Stock transformers computes what the grown model does; training moved that a hundred times further from the base.
    grow("consolidate", work / "run", work / "trained", "--format", "grown")
    grow("verify", work / "trained", "--base", tiny_base)
    architecture = json.loads((tiny_base / "config.json").read_text())["architectures"][0]
    stock, info = getattr(transformers, architecture).from_pretrained(
        work / "stock", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    trained = logits(load(work / "trained", torch.float32))
    apart = (logits(stock.eval()) - trained).abs().max()
    moved = (trained - logits(load(tiny_base, torch.float32))).abs().max()
    assert apart < 1e-4 and moved > 100 * apart
    assert torch.equal(logits(load(work / "trained", alpha=0)), logits(load(tiny_base)))


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.full)])
def test_sft_ends_in_a_stock_checkpoint(text_base: Path, stage: int, tmp_path: Path) -> None:
    """All parameters train, in two groups (norms have no weight decay), so the shards are cut in more ways."""
    recipe = make_recipe(
        tmp_path / "recipe.yaml", text_base, tmp_path, make_data(tmp_path / "data"), stage, method="sft", max_steps=2
    )
    run("launch/train.sh", recipe, NPROC="2")
    grow("consolidate", tmp_path / "run", tmp_path / "stock")
    stock, base = load(tmp_path / "stock", torch.float32), load(text_base, torch.float32)
    assert all(not torch.equal(a, b) for a, b in zip(stock.parameters(), base.parameters(), strict=True))
    # The trained model's own validation loss, computed again from the stock checkpoint.
    seen = json.loads((tmp_path / "run" / "COMPLETE").read_text())["validation_loss"]
    scores = json.loads(
        grow("eval", tmp_path / "stock", "--recipe", _on_validation(recipe), "--json").stdout.splitlines()[-1]
    )
    assert scores["task"]["loss"] == pytest.approx(seen, abs=0.02)


def _on_validation(recipe: Path) -> Path:
    path = recipe.with_name("validation.yaml")
    path.write_text(recipe.read_text() + "test_split: validation\n")
    return path
