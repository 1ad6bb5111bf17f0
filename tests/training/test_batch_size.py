"""per_device_train_batch_size: auto. The largest power of two that fits, on all ranks; noted, and looked for again on
other devices; the global batch stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grow.errors import UserError
from grow.methods import read_recipe
from grow.recipe import Recipe
from grow.training import batch_size
from grow.training.check import check_run
from tests.helpers.running import start, train
from tests.helpers.tiny import free_ports, make_recipe

AUTO = {"per_device_train_batch_size": "auto", "method": "sft"}


@pytest.fixture
def alone() -> Any:
    """A group of one process."""
    (port,) = free_ports(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def recipe_of(base: Path, sums: Path, tmp_path: Path, **fields: Any) -> Recipe:
    return read_recipe(str(make_recipe(tmp_path / "r.yaml", base, tmp_path / "grown", sums, 1, **AUTO, **fields)))


@pytest.mark.parametrize(("batch", "room", "found"), [(8, 8, 8), (8, 5, 4), (12, 100, 4), (8, 1, 1), (7, 100, 1)])
def test_the_largest_that_fits(
    text_base: Path, sums: Path, tmp_path: Path, monkeypatch: Any, alone: None, batch: int, room: int, found: int
) -> None:
    tried: list[int] = []

    def limited(model: Any, head: Any, rows: dict[str, torch.Tensor]) -> None:
        tried.append(len(rows["labels"]))
        if tried[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        ran(model, head, rows)

    ran = batch_size._pass
    monkeypatch.setattr(batch_size, "_pass", limited)
    recipe = recipe_of(text_base, sums, tmp_path, train_batch_size=batch)
    settled = batch_size.with_batch_size(recipe, tmp_path / "run", torch.float32)
    assert settled.per_device_train_batch_size == found == tried[-1] and settled.train_batch_size == batch
    assert tried == sorted(tried, reverse=True) and settled.micro_batch == found


def test_what_fails_otherwise_is_said(
    text_base: Path, sums: Path, tmp_path: Path, monkeypatch: Any, alone: None
) -> None:
    recipe = recipe_of(text_base, sums, tmp_path)
    monkeypatch.setattr(batch_size, "_pass", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(UserError, match="not one sequence of max_length 32 fits"):
        batch_size.with_batch_size(recipe, tmp_path / "run", torch.float32)
    monkeypatch.setattr(batch_size, "_pass", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        batch_size.with_batch_size(recipe, tmp_path / "run", torch.float32)


def test_it_is_refused_under_zero_3(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 3, **AUTO)
    with pytest.raises(UserError, match="not under ZeRO-3"):
        check_run(read_recipe(str(recipe)))


def test_a_run_notes_it(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """A resumed run keeps it on the same device, and looks again on another; the steps see the same global batch."""
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, **AUTO)
    assert "per_device_train_batch_size: 4 fit on CPU" in train(recipe, 1)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["per_device_train_batch_size"] == 4 and facts["recipe"]["per_device_train_batch_size"] == "auto"
    (tmp_path / "run/COMPLETE").unlink()
    assert "fit on" not in train(recipe, 1)
    (tmp_path / "run/COMPLETE").unlink()
    (tmp_path / "run/run.json").write_text(json.dumps(facts | {"device": "another"}))
    assert "per_device_train_batch_size: 4 fit on CPU" in train(recipe, 1)


def test_ranks_agree(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, **AUTO)
    assert "per_device_train_batch_size: 2 fit on CPU" in start(recipe, 2)
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == 2
