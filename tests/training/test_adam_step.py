"""Adam's step by blocks ends in the weights that DeepSpeed's own step ends in, with less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.checkpoint.zero import ZeroCheckpoint
from tests.helpers.running import curve, rank_here, start
from tests.helpers.tiny import make_recipe


def small_blocks(*arguments: Any) -> None:
    """A rank whose blocks are smaller than its matrices, and no divisor of them."""
    from grow.training.deepspeed_patches import adam_step

    adam_step.BLOCK = 1000
    rank_here(*arguments)


def deepspeeds_own(*arguments: Any) -> None:
    """A rank that steps as DeepSpeed does."""
    from grow.training import deepspeed_patches

    deepspeed_patches.step_by_blocks = lambda optimizer: None
    rank_here(*arguments)


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        (2, {"method": "g_freeze", "dtype": "bfloat16"}),
        (1, {"method": "sft", "dtype": "bfloat16", "max_grad_norm": 0.05, "weight_decay": 0.1}),
        pytest.param(1, {"method": "g_train", "dtype": "float32"}, marks=pytest.mark.full),
        pytest.param(2, {"method": "sft", "dtype": "float32", "max_grad_norm": 0}, marks=pytest.mark.full),
    ],
)
def test_as_deepspeed_steps(stage: int, fields: dict[str, Any], text_base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    ends = []
    for name, rank in (("blocks", small_blocks), ("deepspeed", deepspeeds_own)):
        (tmp_path / name).mkdir()
        recipe = make_recipe(tmp_path / name / "r.yaml", text_base, tmp_path / "grown", sums, stage, **fields)
        start(recipe, 2, rank)
        folder = tmp_path / name / "run" / "checkpoint-4"
        trained = {name: torch.as_tensor(value.load()) for name, value in ZeroCheckpoint(folder).trained.items()}
        ends.append((trained, [(step["loss"], step["grad_norm"]) for step in curve(folder)]))
    (ours, our_curve), (theirs, their_curve) = ends
    assert len(our_curve) == 4
    for our_step, their_step in zip(our_curve, their_curve, strict=True):
        assert our_step == pytest.approx(their_step, rel=1e-5)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7, msg=name)
