"""What the libraries would refuse, or take for something else than the recipe says, is one line at --check."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grow.checkpoint.zero import ZeroCheckpoint
from grow.cli.main import main
from grow.methods import read_recipe
from grow.plan import parse_layers
from tests.cli.test_command_line import mistake
from tests.helpers.running import curve, here, train
from tests.helpers.tiny import ROOT, make_recipe

ZERO_2 = json.loads((ROOT / "grow" / "training" / "deepspeed" / "zero2.json").read_text())


def recipe(base: Path, data: Path, folder: Path, text: str = "", settings: Any = None, **fields: Any) -> Path:
    """A recipe of plain fine-tuning, with more lines, and with a DeepSpeed JSON of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {"method": "sft", "report_to": "none", "dtype": "float32"}
    if settings is not None:
        own["deepspeed"] = str(folder / "own.json")
        (folder / "own.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    path = make_recipe(folder / "r.yaml", base, folder / "grown", data, 2, **(own | fields))
    kept = [line for line in path.read_text().splitlines() if not text or line.split(":")[0] != text.split(":")[0]]
    path.write_text("\n".join([*kept, text, ""]))
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("warmup_steps: -5", "warmup_steps must be at least 0"),
        ("adam_beta1: 1", "adam_beta1 must be below 1"),
        ("adam_epsilon: 0.0", "adam_epsilon must be more than 0"),
        ("max_grad_norm: -0.5", "max_grad_norm must be at least 0"),
        ("learning_rate: nan", "learning_rate must be a finite number"),
        ("learning_rate: {sft: inf}", "learning_rate must be a finite number"),
        ("learning_rate: []", "learning_rate: []"),
        ("learning_rate: 2026-01-01", "learning_rate: '2026-01-01'"),
        ("weight_decay: [0.1, 0.2]", "weight_decay: ['0.1', '0.2']"),
        ("save_total_limit: 0", "save_total_limit must be at least 1"),
        ("eval_steps: 0", "eval_steps must be at least 1"),
        ("seed: 10000000000", "seed must be at most"),
        ("max_steps: 0", "max_steps must be at least 1, or -1"),
        ("max_steps: 2.5", "max_steps: '2.5'"),
        ("max_steps: on", "max_steps: 'on'"),
        ("num_train_epochs: 0", "num_train_epochs must be more than 0"),
        ("gradient_checkpointing: perhaps", "gradient_checkpointing: 'perhaps'"),
        ("method: sft\nmethod: lora", "method stands in it twice"),
        ("\tseed: 1", "not YAML"),
        ("base: 2026-13-40", "2026-13-40: no such folder"),
        ("lr_scheduler_type: linaer", "lr_scheduler_type linaer"),
        ("lr_scheduler_type: warmup_stable_decay", "num_decay_steps"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "follows the loss"),
        ("report_to: tensor_board", "report_to tensor_board: is refused"),
    ],
)
def test_values_that_are_refused(
    text: str, says: str, text_base: Path, sums: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = recipe(text_base, sums, tmp_path, text)
    assert says in here(capsys, "train", path, "--check", code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}, "optimizer: the recipe decides that"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "lr_scheduler_type and warmup_steps"),
        ({"gradient_accumulation_steps": 2}, "contradicts the recipe: gradient_accumulation_steps=2"),
        ({"bf16": {"enabled": True}}, "contradicts the recipe: bf16.enabled=True"),
        ({"zero_optimization": {"stage": True}}, "it is 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients is not"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "only the device cpu"),
        ({"elasticity": {"enabled": True}}, "elasticity is not"),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', "stands in it twice"),
        ("[1, 2", "not JSON"),
    ],
)
def test_deepspeed_settings_that_are_refused(
    settings: Any, says: str, text_base: Path, sums: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = settings if isinstance(settings, str) else ZERO_2 | settings
    path = recipe(text_base, sums, tmp_path, settings=whole)
    assert says in here(capsys, "train", path, "--check", code=2)


def test_as_a_whole_command(text_base: Path, sums: Path, tmp_path: Path) -> None:
    path = recipe(text_base, sums, tmp_path)
    assert "report_to mlflow: is refused" in mistake("train", path, "--check", "--report_to", "mlflow")


@pytest.mark.parametrize(
    ("run", "says"), [("file", "not a folder"), ("file/run", "cannot be written"), ("", "not a fo")]
)
def test_a_folder_that_cannot_be_made(
    run: str, says: str, text_base: Path, sums: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    path = recipe(text_base, sums, tmp_path)
    where = str(tmp_path / run) if run else run
    assert says in here(capsys, "train", path, "--check", f"--output_dir={where}", code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_values_are_what_their_fields_take(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """However YAML would read them: as text, in eights, as a date, as a switch."""
    text = f"""\ufeffbase: {text_base}
data: {sums}
prompt: 0123
completion: no
output_dir: 2026-02-03
deepspeed: {ROOT}/grow/training/deepspeed/zero2.json
learning_rate: 3e-3
max_steps: 1e3
gradient_checkpointing: yes
method: sft
"""
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    read = read_recipe(str(path))
    assert (read.prompt, read.learning_rate, read.gradient_checkpointing) == ("0123", 3e-3, True)
    assert (read.output_dir, read.completion, read.max_steps) == ("2026-02-03", "no", 1000)


def test_what_the_json_leaves_out_is_the_recipes(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Clipping above all, which DeepSpeed leaves out itself; and a schedule that asks ZeRO's optimizer for its rate."""
    fields: dict[str, Any] = {"max_grad_norm": 0.01, "lr_scheduler_type": "polynomial", "max_steps": 2}
    trained = []
    for name, settings in (("whole", ZERO_2), ("short", {"zero_optimization": {"stage": 2, "reduce_scatter": False}})):
        path = recipe(text_base, sums, tmp_path / name, settings=settings, **fields)
        train(path, 1)
        checkpoint = tmp_path / name / "run" / "checkpoint-2"
        assert [entry["learning_rate"] for entry in curve(checkpoint)] == pytest.approx([1e-2, 0.5e-2], rel=1e-3)
        trained.append({key: value.load() for key, value in ZeroCheckpoint(checkpoint).trained.items()})
        shutil.rmtree(tmp_path / name / "run")
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_for_as_many_ranks_as_are_planned(
    text_base: Path, sums: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = recipe(text_base, sums, tmp_path, settings=ZERO_2 | {"train_batch_size": 4})
    for ranks in ("1", "2", "4"):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        here(capsys, "train", path, "--check")
    path = recipe(text_base, sums, tmp_path, settings=ZERO_2 | {"gradient_accumulation_steps": 2})
    assert "contradicts the recipe" in here(capsys, "train", path, "--check", code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    here(capsys, "train", path, "--check")


def test_validation_on_rows_that_are_trained_on(
    text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft")
    for split, said in (("train", True), ("train[90%:]", True), ("validation", False)):
        assert main(["train", str(path), "--check", "--validation_split", split]) == 0
        assert ("validation: these rows are trained on; cut them" in capsys.readouterr().err) == said


def test_what_another_method_does_without_is_said(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """A switch, and a mean of checkpoints, which are large; the file's own method has them all the same."""
    path = recipe(text_base, sums, tmp_path, average=2, save_steps=1)
    assert read_recipe(str(path)).average == read_recipe(str(path), {"method": "sft"}).average == 2
    assert main(["train", str(path), "--check", "--method", "flow"]) == 0
    assert "flow: without the recipe's average 2" in capsys.readouterr().err
    assert main(["train", str(path), "--check", "--method", "flow", "--average", "2"]) == 0
    assert "without the recipe's" not in capsys.readouterr().err


def test_a_ranking_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ranking.json").write_text('{"layers": [3, 1, 2]}')
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in ("${HERE}/ranking.json", "~/ranking.json"):
        assert parse_layers(f"top:2:{file}", 4) == (1, 3)
