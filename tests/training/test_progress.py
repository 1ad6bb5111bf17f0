"""What one sees of a run: plain aligned lines of rank 0, and nothing between them; all figures are kept elsewhere."""

import json
import re
from pathlib import Path

from grow.checkpoint.expand import expand
from grow.training.progress import step_line, validation_line
from tests.helpers.tiny import make_data, make_recipe, run, step_lines

FIGURES = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
FIGURES |= {"tokens_per_second", "labels_per_second", "seconds_per_step", "data_share"}


def test_lines_are_aligned() -> None:
    logs = {"loss": 1.5, "learning_rate": 1e-4, "grad_norm": 2.25, "tokens_per_second": 1234.5, "seconds_per_step": 0.5}
    assert step_line("step  9/10", logs | {"mfu": 0.412}, 3661.4) == (
        "step  9/10  loss 1.5000  lr 1.00e-04  norm    2.250      1,234 tokens/s    0.500 s/step  "
        "MFU 41.2%  ETA 1:01:01"
    )
    first = step_line("step 10/10", logs, 0)
    other = step_line("step 10/10", logs | {"grad_norm": 1234.5, "tokens_per_second": 1e5, "seconds_per_step": 12.3}, 0)
    assert len(first) == len(other) and "MFU" not in first
    assert validation_line("step  5/10", {"eval_loss": 2.0, "eval_accuracy": 0.5}) == (
        "step  5/10  validation  loss 2.0000  accuracy 50.0%"
    )


def test_a_log_is_lines_from_rank_0(text_base: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    data = make_data(tmp_path / "data")
    recipe = make_recipe(tmp_path / "recipe.yaml", text_base, tmp_path / "grown", data, 2, logging_steps=2)
    ran = run("launch/train.sh", recipe, NPROC="2")
    said = ran.stdout + ran.stderr
    assert "it/s]" not in said and "{'" not in ran.stdout.partition("g_freeze: ")[2]
    lines = ran.stdout.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("g_freeze: trains ")]
    assert re.fullmatch(
        r"g_freeze: trains 9,216 of [\d,]+ parameters in \w+ on 2 ranks \(.+\); \d+ sequences, [\d,]+ tokens; "
        r"4 steps of 4; grown: the MLPs of 2 layers \(1-2\), 2 times as wide",
        lines[first],
    )
    # Every other line until the run's last is one of a step or of a validation.
    kinds = [re.sub(r"^step (\d+/\d+)  (loss|validation) .*$", r"\1 \2", line) for line in lines[first + 1 : first + 7]]
    assert kinds == ["0/4 validation", "1/4 loss", "2/4 loss", "2/4 validation", "4/4 loss", "4/4 validation"]
    assert lines[first + 7].startswith(f"{tmp_path / 'run'}: done, 4 steps")
    assert len(step_lines(said)) == 3

    history = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry.keys() >= FIGURES for entry in history if "loss" in entry] == [True, True, True]
    assert list((tmp_path / "run" / "logs").glob("events*"))
