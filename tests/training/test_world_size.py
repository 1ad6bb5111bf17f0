"""A run resumes on another number of ranks: the same rows, the same curve, the same weights in the end."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.checkpoint.zero import ZeroCheckpoint
from tests.helpers.running import curve, start
from tests.helpers.tiny import make_base, make_recipe, step_lines

STEPS, LEFT = 8, 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, sums: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world size")
    base = make_base(folder / "base", "text")
    expand(str(base), str(folder / "grown"), layers="1,2")
    return {"base": base, "grown": folder / "grown", "data": sums}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: value.load() for name, value in ZeroCheckpoint(run / f"checkpoint-{STEPS}").trained.items()}


@pytest.mark.parametrize(
    ("method", "stage", "ranks", "then"),
    [
        ("g_freeze", 2, 2, 1),
        ("sft", 2, 1, 2),
        *(
            pytest.param(method, stage, ranks, 3 - ranks, marks=pytest.mark.full)
            for method in ("g_freeze", "sft")
            for stage in (1, 2, 3)
            for ranks in (1, 2)
            if (method, stage, ranks) not in (("g_freeze", 2, 2), ("sft", 2, 1))
        ),
    ],
)
def test_another_number_of_ranks_goes_on(
    setting: dict[str, Path], method: str, stage: int, ranks: int, then: int, tmp_path: Path
) -> None:
    def recipe(name: str, **fields: Any) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        # Weight decay that would show in the norms, which have none.
        common = {"method": method, "dtype": "float32", "weight_decay": 1.0, "learning_rate": 3e-3, "eval_steps": 50}
        return make_recipe(
            tmp_path / name / "recipe.yaml", **setting, stage=stage, max_steps=STEPS, save_steps=LEFT,
            **(common | fields),
        )  # fmt: skip

    start(recipe("undisturbed"), 1)
    whole, run = tmp_path / "undisturbed" / "run", tmp_path / "moved" / "run"
    moved = recipe("moved")
    start(moved, ranks)
    remove_last_half(run)
    said = start(moved, then)
    assert len(step_lines(said)) == STEPS - LEFT, "the steps that were not done yet, and no others"
    assert not (run / "universal").exists()
    expected, found = (curve(folder / f"checkpoint-{STEPS}") for folder in (whole, run))
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    for key, allowed in (("loss", 1e-3), ("learning_rate", 1e-12)):
        assert [entry[key] for entry in found] == pytest.approx([entry[key] for entry in expected], abs=allowed)
    ends = weights(whole)
    for name, tensor in weights(run).items():
        assert (tensor - ends[name]).abs().max() < 1e-3, name


def remove_last_half(run: Path) -> None:
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    (run / "COMPLETE").unlink()
