"""The norm of the gradients is DeepSpeed's own, taken in one pass; what is not finite is found by it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.training.deepspeed_patches.gradient_norm import norm
from tests.helpers.running import rank_here, start
from tests.helpers.tiny import make_recipe

BROKEN = 2
"""The call that gets a gradient with a NaN."""


def test_long_and_not_finite() -> None:
    tensor = torch.randn(2**23).to(torch.bfloat16)
    expected = tensor.double().norm().item()
    assert norm([tensor]).item() == norm(list(tensor.view(32, -1))).item() == pytest.approx(expected, rel=2e-5)
    for value in (math.nan, math.inf):
        tensor[12345] = value
        assert not norm([tensor]).isfinite()


def comparing_rank(recipe: Path, output: Path, rank: int, *more: Any) -> None:
    """A rank that notes each norm, ours and DeepSpeed's, and how many steps were left out."""
    import deepspeed

    from grow.training import deepspeed_patches

    step, install = deepspeed.DeepSpeedEngine.step, deepspeed_patches.one_pass_norm
    found: dict[str, Any] = {"norms": [], "left_out": 0}

    def compared(optimizer: Any) -> None:
        install(optimizer)
        ours = optimizer.get_grad_norm_direct

        def both(gradients: list[torch.Tensor], params: list[Any], norm_type: float = 2) -> torch.Tensor:
            if rank == 0 and len(found["norms"]) == BROKEN:
                gradients[-1].view(-1)[0] = math.nan
            theirs = type(optimizer).get_grad_norm_direct(optimizer, gradients, params, norm_type)
            found["norms"].append((ours(gradients, params, norm_type).item(), theirs.item()))
            return ours(gradients, params, norm_type)

        optimizer.get_grad_norm_direct = both

    def counted(engine: Any, *arguments: Any, **named: Any) -> None:
        step(engine, *arguments, **named)
        found["left_out"] = engine.skipped_steps
        recipe.with_suffix(f".{rank}.json").write_text(json.dumps(found))

    deepspeed_patches.one_pass_norm, deepspeed.DeepSpeedEngine.step = compared, counted
    rank_here(recipe, output, rank, *more)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (2, "bfloat16"),
        (3, "bfloat16"),
        pytest.param(1, "bfloat16", marks=pytest.mark.full),
        pytest.param(2, "float32", marks=pytest.mark.full),
        pytest.param(3, "float32", marks=pytest.mark.full),
    ],
)
def test_as_deepspeed_has_it(stage: int, dtype: str, text_base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    recipe = make_recipe(
        tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, stage, method="g_freeze", dtype=dtype, max_steps=4
    )
    start(recipe, 2, comparing_rank)
    # ZeRO-1 and 2 hand the broken step to DeepSpeed's own, which takes the norm anew before it leaves an fp32 step out.
    broken = {BROKEN, BROKEN + 1} if stage != 3 and dtype == "float32" else {BROKEN}
    for rank in range(2):
        found = json.loads(recipe.with_suffix(f".{rank}.json").read_text())
        for call, (ours, theirs) in enumerate(found["norms"]):
            assert ours == pytest.approx(theirs, rel=1e-5) and (ours == -1) == (call in broken)
        assert len(found["norms"]) == 3 + len(broken) and found["left_out"] == 1
