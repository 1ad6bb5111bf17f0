"""The mean of a run's last checkpoints is that of their weights, for every kind of run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grow.checkpoint.expand import expand
from grow.checkpoint.metadata import read_growth
from grow.checkpoint.run_folder import counting_checkpoints, due_checkpoints, remove_old_checkpoints
from grow.checkpoint.shards import read_json
from grow.checkpoint.verify import verify
from grow.methods.trained_model import load_model
from grow.model.loading import load
from tests.helpers.checkpoints import edit_json
from tests.helpers.running import consolidate, here, train
from tests.helpers.tiny import folder_checksums, logits, make_recipe


@pytest.mark.parametrize("method", ["g_freeze", "sft", "lora"])
def test_a_mean_of_weights(
    method: str, text_base: Path, sums: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    expand(str(text_base), str(tmp_path / "grown"))
    fields = {"method": method, "max_steps": 6, "save_steps": 2, "save_total_limit": 3, "learning_rate": 1e-2}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **fields)
    train(recipe, 1)
    run = tmp_path / "run"

    def stock(source: Path, name: str, average: int = 1) -> dict[str, torch.Tensor]:
        consolidate(str(source), str(tmp_path / name), dtype="float32", average=average)
        return load_file(tmp_path / name / "model.safetensors")

    single = [stock(run / f"checkpoint-{step}", str(step)) for step in (2, 4, 6)]
    mean, last = stock(run, "mean", 3), stock(run, "last", 2)
    moved = [name for name in mean if not torch.equal(single[0][name], single[2][name])]
    assert moved
    for name, value in mean.items():
        # LoRA's are merged in bf16; the mean is taken of what is merged.
        assert torch.allclose(value, torch.stack([one[name] for one in single]).mean(0), rtol=1e-6, atol=1e-7), name
        assert torch.allclose(last[name], (single[1][name] + single[2][name]) / 2, rtol=1e-6, atol=1e-7), name
    assert "after steps 2, 4, 6" in (tmp_path / "mean" / "README.md").read_text()

    if method == "g_freeze":  # still grown, it computes the same, and the base is inside as it was
        consolidate(str(run), str(tmp_path / "still"), "grown", average=3)
        assert verify(str(tmp_path / "still"), str(text_base))["problems"] == []
        grown = load(tmp_path / "still", torch.float32)
        assert torch.allclose(logits(grown), logits(load(tmp_path / "mean", torch.float32)), atol=2e-2)
        assert torch.equal(logits(load(tmp_path / "still", torch.float32, 0)), logits(load(text_base, torch.float32)))
        here(capsys, "growth", run, tmp_path / "package", "--average", "3")
        here(capsys, "attach", text_base, tmp_path / "package", tmp_path / "again")
        again, still = read_growth(tmp_path / "again"), read_growth(tmp_path / "still")
        assert again["tensors"] == still["tensors"], "checksums"

    consolidate(str(run), str(tmp_path / "one"), dtype="float32", average=1)
    assert folder_checksums(tmp_path / "one") == folder_checksums(tmp_path / "6")
    out = tmp_path / "out"
    assert "3 complete checkpoints" in here(capsys, "consolidate", run, out, "--average", "4", code=2)
    assert "--average 0" in here(capsys, "consolidate", run, out, "--average", "0", code=2)
    assert "is not a run's folder" in here(capsys, "consolidate", run / "checkpoint-4", out, "--average", "2", code=2)
    assert "is not a run's folder" not in here(capsys, "consolidate", tmp_path / "none", out, "--average", "2", code=2)
    assert "a number" in here(capsys, "consolidate", run, out, "--average", "two", code=2)
    assert not out.exists()


def test_a_recipe_says_so(text_base: Path, sums: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """The run's own result is the mean then, and whatever opens the run has it; a checkpoint that was made because the
    run was preempted is not among them."""
    expand(str(text_base), str(tmp_path / "grown"))
    fields = {"max_steps": 7, "save_steps": 2, "average": 3, "learning_rate": 1e-2}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, **fields)
    train(recipe, 1)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (4, 6, 7)]
    mean = read_growth(run / "result")
    assert mean["trained"]["averaged_steps"] == [4, 6, 7]
    assert read_json(run / "COMPLETE")["average"] == 3
    consolidate(str(run), str(tmp_path / "still"), "grown")
    assert read_growth(tmp_path / "still")["tensors"] == mean["tensors"]
    assert torch.equal(logits(load_model(run)), logits(load(tmp_path / "still")))
    consolidate(str(run), str(tmp_path / "last"), "grown", average=1)
    assert read_growth(tmp_path / "last")["tensors"] != mean["tensors"]
    # A run that was not to be averaged, and one of before there was the field, have what they have kept.
    edit_json(run / "run.json", recipe=read_json(run / "run.json")["recipe"] | {"average": 1, "save_steps": 4})
    assert len(counting_checkpoints(run, 3)) == 3 and len(counting_checkpoints(run)) == 1
    edit_json(run / "run.json", recipe=read_json(run / "run.json")["recipe"] | {"average": 3, "save_steps": 2})
    # Preempted after step 5, and resumed.
    (run / "checkpoint-6").rename(run / "checkpoint-5")
    assert [path.name for path in due_checkpoints(run, 2)] == ["checkpoint-7", "checkpoint-4"]
    assert "2 complete checkpoints" in here(capsys, "growth", run, tmp_path / "no", "--average", "3", code=2)
    here(capsys, "growth", run, tmp_path / "fewer")
    assert read_growth(tmp_path / "fewer")["trained"]["averaged_steps"] == [4, 7], "as many as there are"
    remove_old_checkpoints(run, 7, 3, every=2)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-7"]


def test_of_loras_that_are_not_merged(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Their folder, as PEFT has it, is of the sum of their ranks, and computes what the mean of merged weights does."""
    fields = {"method": "lora", "max_steps": 6, "save_steps": 2, "average": 3}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 1, learning_rate=1e-2, **fields)
    train(recipe, 1)
    run = tmp_path / "run"
    model: Any = load(run / "result", torch.float32)
    assert model.peft_config["default"].r == 3 * 16
    consolidate(str(run), str(tmp_path / "merged"), dtype="float32")
    assert torch.allclose(logits(model), logits(load(tmp_path / "merged", torch.float32)), atol=1e-4)
    consolidate(str(run), str(tmp_path / "last"), dtype="float32", average=1)
    assert not torch.allclose(logits(model), logits(load(tmp_path / "last", torch.float32)), atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"average": 2, "keep_best": True}, "keep_best takes one checkpoint"),
        ({"average": 2, "method": "adapter"}, "of checkpoints by adapter there is no mean"),
        ({"average": 0}, "average must be at least 1"),
    ],
)
def test_mistakes(
    text_base: Path, sums: Path, capsys: pytest.CaptureFixture, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "run" / "grown", sums, 1, **fields)
    assert message in here(capsys, "train", recipe, "--check", code=2)
