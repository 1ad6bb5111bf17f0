"""A run resumes wherever it and what it reads have moved to, by what is in them; and touches nothing but its own."""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from grow.checkpoint.expand import expand
from grow.checkpoint.output import sync
from grow.checkpoint.run_folder import (
    clear_place,
    complete_checkpoints,
    find_corruption,
    fsync_and_hash,
    mark_complete,
    own_checkpoints,
    remove_old_checkpoints,
    validation_losses,
)
from grow.errors import UserError
from grow.methods import read_recipe
from grow.training import run_file
from grow.training.same_run import check_same_run, places
from tests.helpers.running import FORKED, here, train, train_here
from tests.helpers.slurm_cluster import wait_for
from tests.helpers.tiny import ROOT, folder_checksums, make_data, make_recipe, step_lines


@pytest.fixture(scope="module")
def done(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, in a folder with all that it read but the base."""
    folder = tmp_path_factory.mktemp("moved") / "before"
    make_data(folder / "data")
    (folder / "ds.json").write_text((ROOT / "grow" / "training" / "deepspeed" / "zero2.json").read_text())
    fields = {"method": "sft", "report_to": "none", "deepspeed": str(folder / "ds.json"), "save_steps": 1}
    train(
        make_recipe(folder / "r.yaml", text_base, folder / "grown", folder / "data", 2, save_total_limit=9, **fields), 1
    )
    return folder


@pytest.fixture
def stopped(done: Path, tmp_path: Path) -> Path:
    """The same as if it had been killed after step 2, and moved with its data; the recipe says where it is now."""
    folder = tmp_path / "after"
    shutil.copytree(done, folder)
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(folder / "run" / name)
    (folder / "run" / "COMPLETE").unlink()
    (folder / "ds.json").rename(folder / "renamed.json")
    recipe = (folder / "r.yaml").read_text().replace(str(done), str(folder)).replace("ds.json", "renamed.json")
    (folder / "r.yaml").write_text(recipe)
    return folder


def test_moved_it_goes_on_and_leaves_alone_what_is_not_its_own(done: Path, stopped: Path, tmp_path: Path) -> None:
    run, elsewhere = stopped / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("checkpoint-2-keep", "checkpoint-007", "checkpoint-best"):
        shutil.copytree(run / "checkpoint-2", run / name)
    for place in (run / "universal", run / "result", run / "checkpoint-final", elsewhere):
        place.mkdir(exist_ok=True)
        (place / "notes.txt").write_text("mine")
    (run / "checkpoint-1" / "notes.txt").write_text("mine")
    (run / "checkpoint-3").symlink_to(elsewhere)
    before = folder_checksums(run)
    (stopped / "r.yaml").write_text(
        (stopped / "r.yaml").read_text().replace("save_total_limit: 9", "save_total_limit: 1")
    )
    said = train(stopped / "r.yaml", 1)
    assert len(step_lines(said)) == 2, "from step 2, of the run that was moved"
    ends = [validation_losses(folder / "run" / "checkpoint-4")[-1] for folder in (stopped, done)]
    assert ends[0] == ends[1]
    after = folder_checksums(run)
    kept = {
        name: sum_
        for name, sum_ in before.items()
        if not name.startswith(("checkpoint-2/", "checkpoint-3/", "run.json"))
    }
    moved = {name.replace("result/", "result.kept/"): sum_ for name, sum_ in kept.items()}
    assert {name: after.get(name) for name in moved} == moved
    assert folder_checksums(elsewhere) == {"notes.txt": before["checkpoint-1/notes.txt"]}
    assert not (run / "checkpoint-2").exists() and (run / "checkpoint-4").is_dir()
    assert (run / "checkpoint-3.kept").is_symlink(), "nothing was written through it"


def test_other_contents_are_another_run(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, settings = stopped / "r.yaml", stopped / "renamed.json"
    here(capsys, "train", recipe, "--check", f"--data={stopped}/./data/", f"--output_dir={stopped}/data/../run/")
    text = settings.read_text()
    settings.write_text(json.dumps(json.loads(text) | {"steps_per_print": 3}))
    here(capsys, "train", recipe, "--check")
    settings.write_text(text.replace('"reduce_scatter": false', '"reduce_scatter": true'))
    assert "another zero_optimization" in here(capsys, "train", recipe, "--check", code=2)
    settings.write_text(text)
    assert "learning_rate" in here(capsys, "train", recipe, "--check", "--learning_rate=3e-4", code=2)
    (stopped / "run" / "run.json").write_text("{}")
    assert "not what a run writes" in here(capsys, "train", recipe, "--check", code=2)


def test_text_that_a_method_reads_is_compared_too(
    text_base: Path, sums: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(text, tmp_path / "prose")
    fields: dict[str, Any] = {"method": "sft", "kl_weight": 1.0, "kl_text": str(tmp_path / "prose")}
    path = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **fields)
    recipe = read_recipe(str(path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": recipe.values()} | places(recipe)))
    (tmp_path / "prose").rename(tmp_path / "verse")
    moved = f"--kl_text={tmp_path / 'verse'}"
    here(capsys, "train", path, "--check", moved)
    (tmp_path / "verse" / "train.jsonl").write_text('{"text": "Something else."}\n')
    assert "other contents of" in here(capsys, "train", path, "--check", moved, code=2)


def test_names_on_the_hub_are_compared_as_text(
    text_base: Path, sums: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, method="sft")
    hub, other = (read_recipe(str(path), {"data": name}) for name in ("someone/sums", "someone/more-sums"))
    (tmp_path / "run").mkdir()
    for kept in (places(hub), {}):  # also by a run.json that does not say what was a folder
        (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": hub.values()} | kept))
        check_same_run(tmp_path / "run", hub)
        for one in (other, read_recipe(str(path))):
            with pytest.raises(UserError, match="holds a run with data 'someone/sums'"):
                check_same_run(tmp_path / "run", one)


def checkpoint(run: Path, name: str, step: int, complete: bool = True) -> Path:
    (run / name / f"global_step{step}").mkdir(parents=True)
    (run / name / f"global_step{step}" / "mp_rank_00_model_states.pt").write_text("")
    (run / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if complete:
        mark_complete(run / name, {})
    return run / name


def test_which_checkpoints_are_the_runs(tmp_path: Path) -> None:
    for name in (
        "checkpoint-2",
        "checkpoint-2-keep",
        "checkpoint-02",
        "checkpoint-2.bak",
        "checkpoint-",
        "checkpoint-٢",
    ):
        checkpoint(tmp_path, name, 2)
    copied = checkpoint(tmp_path, "checkpoint-10", 2)
    checkpoint(tmp_path, "checkpoint-9", 9, complete=False)
    assert [path.name for path in own_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-2"]
    assert find_corruption(copied) == "was written after step 2"


def test_old_checkpoints_go_and_later_ones_do_not_count(tmp_path: Path) -> None:
    """Later than what has just been written is what was gone back from: it may be damaged."""
    for step in (2, 4, 6, 8):
        path = checkpoint(tmp_path, f"checkpoint-{step}", step, complete=False)
        if step != 4:
            mark_complete(path, fsync_and_hash(path, 0, {}))
    remove_old_checkpoints(tmp_path, newest=6, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    (tmp_path / "checkpoint-6" / "notes.txt").write_text("mine")
    for step in (6, 8):
        clear_place(tmp_path / f"checkpoint-{step}")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6.kept"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_folders_that_cannot_be_synced(
    call: str, number: int, text_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = getattr(os, call)
    number = errno.EACCES if call == "open" and number == errno.EBADF else number

    def refuse(what: Any, *more: Any, **named: Any) -> Any:
        if os.path.isdir(what) if call == "open" else os.path.isdir(f"/proc/self/fd/{what}"):
            raise OSError(number, os.strerror(number))
        return real(what, *more, **named)

    monkeypatch.setattr(os, call, refuse)
    expand(str(text_base), str(tmp_path / "grown"))
    assert (tmp_path / "grown" / "config.json").exists()


def test_a_disk_that_fails_is_still_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, number in ((tmp_path / "file", errno.EINVAL), (tmp_path, errno.EIO), (tmp_path, errno.ENOSPC)):

        def fail(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            sync(path)


def test_one_process_trains_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another waits for it, and says so in the end."""
    monkeypatch.setattr(run_file, "_SECONDS", 1)
    first = run_file.Claim(tmp_path / "run")
    first.take()
    first.take()
    with pytest.raises(UserError, match="another process trains this run"):
        run_file.Claim(tmp_path / "run").take()
    del first
    run_file.Claim(tmp_path / "run").take()


def test_a_run_that_is_done_while_another_start_waits(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft")
    train(recipe, 1)
    run = tmp_path / "run"
    before = folder_checksums(run)
    (run / "COMPLETE").rename(tmp_path / "kept")
    first = run_file.Claim(run)
    first.take()
    waiting = FORKED.Process(target=train_here, args=(recipe, tmp_path / "second.out"))
    waiting.start()
    wait_for(lambda: (tmp_path / "second.out").exists(), 60, "the second start")
    time.sleep(3)  # it has looked for the marker before it waits
    (tmp_path / "kept").rename(run / "COMPLETE")
    del first
    waiting.join()
    assert waiting.exitcode == 0 and "was done already" in (tmp_path / "second.out").read_text()
    assert folder_checksums(run) == before
