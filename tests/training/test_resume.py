"""No step is lost: killed, preempted, a broken checkpoint, a full disk; what resumes ends in the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grow.checkpoint.expand import expand
from tests.helpers.tiny import ROOT, file_checksum, free_ports, grow, make_data, make_recipe, step_lines

STEPS, EPOCH = 16, 10  # the rows fill about ten steps, so that step 13 lies in the second epoch


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.helpers.tiny import make_base

    folder = tmp_path_factory.mktemp("resume")
    base = make_base(folder / "base", "text")
    expand(str(base), str(folder / "grown"))
    return {"base": base, "grown": folder / "grown", "data": make_data(folder / "data")}


def recipe(setting: dict[str, Path], folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    more = {"max_steps": STEPS, "save_steps": 4, "eval_steps": 50, "learning_rate": 1e-3, "report_to": "none"}
    return make_recipe(folder / "recipe.yaml", **setting, stage=2, **(more | fields))


def start(path: Path, ranks: int = 1) -> list[subprocess.Popen[str]]:
    """The ranks of a run, each a process of its own, as srun starts them."""
    (port,) = free_ports(1)
    common = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "grow", "train", str(path)], cwd=ROOT, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def losses(process: subprocess.Popen[str], into: list[str]) -> Iterator[str]:
    """The losses of a run as it logs them; all else that it says lands in `into`."""
    assert process.stdout is not None
    for line in process.stdout:
        into.append(line)
        if step_lines(line):
            yield line.split()[3]


def finish(path: Path, code: int = 0) -> tuple[list[str], str]:
    """Runs to the end, in one process. Returns the losses, and all that was said."""
    (process,) = start(path)
    said: list[str] = []
    seen = list(losses(process, said))
    assert process.wait(60) == code, "".join(said)[-3000:]
    return seen, "".join(said)


def weights(run: Path, out: Path) -> dict[str, str]:
    grow("consolidate", run, out)
    return {file.name: file_checksum(file) for file in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(setting: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    seen, _ = finish(recipe(setting, folder))
    assert len(seen) == STEPS
    return seen, weights(folder / "run", folder / "stock")


@pytest.mark.gpu
def test_killed_in_the_first_epoch_and_in_the_second(
    setting: dict[str, Path], undisturbed: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    path, seen = recipe(setting, tmp_path), {}
    for kill_at in (6, 13):
        (process,) = start(path)
        step = max(seen, default=0) // 4 * 4
        for loss in losses(process, []):
            step += 1
            assert seen.setdefault(step, loss) == loss, "a step that is done again has the same loss"
            if step == kill_at:
                process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    rest, _ = finish(path)
    assert len(rest) == STEPS - 12, "it resumed after the last complete checkpoint"
    for step, loss in enumerate(rest, 13):
        assert seen.setdefault(step, loss) == loss
    expected, bits = undisturbed
    assert [seen[step] for step in sorted(seen)] == expected
    assert weights(tmp_path / "run", tmp_path / "stock") == bits


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_signal_to_one_rank_makes_all_leave_together(setting: dict[str, Path], stage: int, tmp_path: Path) -> None:
    path = recipe(setting, tmp_path, deepspeed=str(ROOT / f"grow/training/deepspeed/zero{stage}.json"))
    first, second = start(path, ranks=2)
    said: list[str] = []
    for step, _ in enumerate(losses(first, said), 1):
        if step == 5:
            second.send_signal(signal.SIGUSR1)
            asked = time.monotonic()
    assert first.wait(60) == second.wait(60) == 75
    assert time.monotonic() - asked < 30
    assert second.stdout is not None and not second.stdout.read().count("grow:"), "one line, from rank 0"
    assert re.fullmatch(r"grow: .*: preempted at step \d+ of 16, with a checkpoint; .*\n", said[-1])
    (newest,) = [folder.name for folder in (tmp_path / "run").glob("checkpoint-*") if folder.name != "checkpoint-4"]
    assert (tmp_path / "run" / newest / "COMPLETE").exists() and not (tmp_path / "run" / "COMPLETE").exists()
    ranks = start(path, ranks=2)
    rest = list(losses(ranks[0], []))
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert len(rest) == STEPS - int(newest.split("-")[1])


@pytest.mark.gpu
def test_a_broken_checkpoint_is_passed_over(
    setting: dict[str, Path], undisturbed: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    path = recipe(setting, tmp_path)
    (process,) = start(path)
    for step, _ in enumerate(losses(process, []), 1):
        if step == 10:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    (shard,) = newest.rglob("*optim_states.pt")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    rest, said = finish(path)
    assert f"{newest}: " in said and "changed since it was written; going back" in said
    assert len(rest) == STEPS - 8
    assert weights(tmp_path / "run", tmp_path / "stock") == undisturbed[1]


def test_a_loss_that_is_no_number_ends_the_run(setting: dict[str, Path], tmp_path: Path) -> None:
    _, said = finish(recipe(setting, tmp_path, learning_rate=1e30, max_grad_norm=1e30), code=1)
    assert "grow: step" in said and "the loss is not a number any more" in said and "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoint-*/COMPLETE"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the small disk that fills")
def test_a_full_disk_ends_the_run_and_the_run_goes_on(
    setting: dict[str, Path], undisturbed: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    try:
        path = recipe(setting, tmp_path, output_dir=str(disk / "run"))
        (disk / "filler").write_bytes(b"x" * 3_900_000)
        _, said = finish(path, code=1)
        assert "cannot be written (0 MB free; [Errno 28] No space left" in said and "Traceback" not in said
        (disk / "filler").unlink()
        finish(path)
        assert weights(disk / "run", tmp_path / "stock") == undisturbed[1]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_of_another_recipe_is_not_gone_on_with(setting: dict[str, Path], tmp_path: Path) -> None:
    path = recipe(setting, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": {"seed": 1}}))
    _, said = finish(path, code=2)
    assert "holds a run with" in said


def test_a_run_does_not_go_on_with_other_rows(setting: dict[str, Path], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    path = recipe(setting | {"data": data}, tmp_path, max_steps=4)
    (process,) = start(path)
    for _ in losses(process, []):
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace('"answer": "4"', '"answer": "5"'))
    _, said = finish(path, code=2)
    assert "began with other contents of train (data_checksums)" in said and "Traceback" not in said
    (data / "train.jsonl").write_text(rows)
    finish(path)
