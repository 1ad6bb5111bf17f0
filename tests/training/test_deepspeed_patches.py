"""With another DeepSpeed or Trainer than the code was written for, a run is right without the patches, or refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from grow.checkpoint.expand import expand
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError
from grow.training.trainer_checkpoints import check_trainer
from tests.helpers.running import curve, rank_here, start
from tests.helpers.tiny import make_recipe


def another_version(*arguments: Any) -> None:
    """A rank that takes the installed DeepSpeed for another."""
    import deepspeed

    deepspeed.__version__ = "0.99.0+cpu"
    rank_here(*arguments)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value.load()) for name, value in ZeroCheckpoint(folder).trained.items()}


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), pytest.param(3, 1, marks=pytest.mark.full)])
def test_another_deepspeed_trains_and_resumes(
    stage: int, ranks: int, text_base: Path, sums: Path, tmp_path: Path
) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    ends = {}
    for name, rank in (("patched", rank_here), ("another", another_version)):
        (tmp_path / name).mkdir()
        recipe = make_recipe(
            tmp_path / name / "r.yaml", text_base, tmp_path / "grown", sums, stage, method="g_freeze", dtype="float32"
        )
        said = start(recipe, ranks, rank)
        assert said.count("DeepSpeed 0.99.0: what speeds up 0.19.8 is left out") == (name == "another")
        ends[name] = tmp_path / name / "run" / "checkpoint-4"
    for one, other in zip(*(curve(folder) for folder in ends.values()), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)
    expected, found = (trained(folder) for folder in ends.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)

    # Resumed, it ends in the same bits; and so does what is begun without the patches and resumed with them, nearly.
    for rank, same in ((another_version, torch.equal), (rank_here, torch.allclose)):
        shutil.rmtree(ends["another"])
        (tmp_path / "another" / "run" / "COMPLETE").unlink()
        start(recipe, ranks, rank)
        again = trained(ends["another"])
        assert all(same(again[name], value) for name, value in found.items())


def test_a_trainer_without_what_is_overridden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trainer()
    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", lambda self, model: None)
    with pytest.raises(UserError, match="has another _save_checkpoint"):
        check_trainer()
    monkeypatch.delattr(transformers.Trainer, "_save_checkpoint")
    with pytest.raises(UserError, match="has another _save_checkpoint"):
        check_trainer()
