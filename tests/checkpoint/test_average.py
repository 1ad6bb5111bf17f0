"""The mean of a run's last checkpoints is that of their weights, for every kind of run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grow.checkpoint.expand import expand
from grow.checkpoint.metadata import read_growth
from grow.checkpoint.verify import verify
from grow.model.loading import load
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
