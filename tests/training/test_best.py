"""The checkpoint with the lowest validation loss is kept and counts; a run that gets no lower ends early."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.checkpoint.run_folder import best_step, complete_checkpoints, final_checkpoint, step_of, validation_losses
from grow.checkpoint.zero import ZeroCheckpoint
from grow.model.loading import load
from tests.helpers.running import consolidate, here, step_lines, train
from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.gpu

FIELDS: dict[str, Any] = {
    "dtype": "float32", "max_steps": 40, "eval_steps": 2, "save_steps": 6, "save_total_limit": 1,
    "lr_scheduler_type": "constant", "learning_rate": 3e-2, "train_split": "train[:12]",
    "keep_best": True, "early_stopping_patience": 3,
}  # fmt: skip


def test_the_lowest_counts(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Of a dozen rows the model learns too much: the loss falls and rises again."""
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    recipe, run = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **FIELDS), tmp_path / "run"
    train(recipe, 1)
    done = json.loads((run / "COMPLETE").read_text())
    last = complete_checkpoints(run)[0]
    losses = validation_losses(last)
    best = best_step(losses)
    assert done["best_step"] == best and done["validation_loss"] == min(loss for step, loss in losses if step)
    assert 0 < best < done["steps"] < 40 and done["steps"] == best + 3 * 2 == step_of(last), "three without a lower one"
    assert [step_of(path) for path in complete_checkpoints(run)] == [done["steps"], best]
    assert step_of(final_checkpoint(run)) == best
    consolidate(str(run), str(tmp_path / "trained"), "grown")
    parameters = dict(load(tmp_path / "trained", torch.float32).named_parameters())
    kept = ZeroCheckpoint(run / f"checkpoint-{best}").trained
    assert all(torch.equal(parameters[name], value.load().bfloat16().float()) for name, value in kept.items())

    # Resumed before it ended, it counts on, and ends where it ended.
    lost = [path for path in complete_checkpoints(run) if step_of(path) > best]
    shutil.rmtree(lost[0])
    (run / "COMPLETE").unlink()
    again = train(recipe, 1)
    assert len(step_lines(again)) == done["steps"] - best
    assert json.loads((run / "COMPLETE").read_text()) == done
    # Resumed with nothing lost but its mark, it ends again after a step.
    (run / "COMPLETE").unlink()
    assert len(step_lines(train(recipe, 1))) <= 1
    assert step_of(final_checkpoint(run)) == best


def test_a_resume_between_two_validations_changes_nothing(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Checkpoints and validations at different steps: resumed, it ends where it would have ended."""
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    fields = FIELDS | {"eval_steps": 4, "save_steps": 6, "save_total_limit": 9}
    recipe, run = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **fields), tmp_path / "run"
    train(recipe, 1)
    done = (run / "COMPLETE").read_text()
    between = next(path for path in complete_checkpoints(run) if step_of(path) % 4)
    for path in complete_checkpoints(run):
        if step_of(path) > step_of(between):
            shutil.rmtree(path)
    (run / "COMPLETE").unlink()
    train(recipe, 1)
    assert (run / "COMPLETE").read_text() == done


def test_asked_for_late_it_names_a_checkpoint_that_is_there(text_base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    fields = FIELDS | {"keep_best": False, "early_stopping_patience": 0, "max_steps": 18}
    recipe, run = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **fields), tmp_path / "run"
    train(recipe, 1)
    (run / "COMPLETE").unlink()
    later = make_recipe(
        tmp_path / "later.yaml", text_base, tmp_path / "grown", sums, 2, **(fields | {"keep_best": True})
    )
    train(later, 1)
    done = json.loads((run / "COMPLETE").read_text())
    assert done["best_step"] == step_of(final_checkpoint(run))
    assert done["validation_loss"] == dict(validation_losses(final_checkpoint(run)))[done["best_step"]]


def test_a_loss_that_is_no_number_is_not_the_lowest() -> None:
    assert best_step([(0, 1.0), (2, float("nan")), (4, 3.0), (6, 2.0), (8, 2.0)]) == 6


def test_without_either_the_last_counts(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    fields = FIELDS | {"keep_best": False, "early_stopping_patience": 0, "max_steps": 12}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **fields)
    train(recipe, 1)
    assert [step_of(path) for path in complete_checkpoints(tmp_path / "run")] == [12]
    assert "best_step" not in json.loads((tmp_path / "run" / "COMPLETE").read_text())
    line = here(capsys, "train", recipe, "--check", "--early_stopping_patience", -1, code=2)
    assert "early_stopping_patience must be at least 0" in line
