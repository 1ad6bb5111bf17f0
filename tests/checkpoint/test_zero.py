"""DeepSpeed's checkpoints of every stage, world size and kind hold what the model had in memory."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError
from tests.helpers.tiny import make_base
from tests.helpers.zero_writer import CASES, launch, name_of

WORLD_SIZES = [3, *(pytest.param(size, marks=pytest.mark.full) for size in (1, 2, 4))]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A base, the folder of DeepSpeed checkpoints, the world size."""
    folder = tmp_path_factory.mktemp("zero")
    base = make_base(folder / "base", "text")
    launch(base, folder, request.param)
    return base, folder, request.param


@pytest.mark.parametrize(("stage", "dtype", "exclude"), CASES)
def test_masters_are_those_in_memory(written: tuple[Path, Path, int], stage: int, dtype: str, exclude: bool) -> None:
    base, folder, world_size = written
    case = name_of(stage, dtype, exclude)
    expected = load_file(folder / f"{case}.safetensors")
    zero = ZeroCheckpoint(folder / case)
    assert zero.stage == stage and zero.world_size == (world_size if stage else 1)
    assert set(expected) <= set(zero.trained)
    for name, tensor in expected.items():
        assert torch.equal(zero.trained[name].load(), tensor), name
        middle = len(tensor) // 2
        assert (zero.trained[name].to("F32").rows(1, middle) == tensor[1:middle].float().numpy()).all()
    if stage >= 2:
        assert bool(zero.frozen) != exclude
    for name, lazy in zero.frozen.items():
        assert torch.equal(lazy.load(), Checkpoint(base).read(name)), name
    # The other tag holds the step before.
    first = ZeroCheckpoint(folder / case, "first")
    assert not torch.equal(first.trained["model.norm.weight"].load(), expected["model.norm.weight"])
    with pytest.raises(UserError, match="there are: first, second"):
        ZeroCheckpoint(folder / case, "third")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_consolidation_without_a_run(written: tuple[Path, Path, int], stage: int, tmp_path: Path) -> None:
    """Any DeepSpeed folder will do, if it is said what training started from."""
    base, folder, _ = written
    case = name_of(stage, "fp32", False)
    with pytest.raises(UserError, match="--start"):
        consolidate(str(folder / case), str(tmp_path / "stock"))
    consolidate(str(folder / case), str(tmp_path / "stock"), start=str(base), dtype="float32")
    expected, stock = load_file(folder / f"{case}.safetensors"), Checkpoint(tmp_path / "stock")
    for name in stock.tensors:
        wanted = expected[name] if name in expected else Checkpoint(base).read(name).float()
        assert torch.equal(stock.read(name), wanted), name
    # Half way back to the base.
    consolidate(str(folder / case), str(tmp_path / "half"), start=str(base), dtype="float32", alpha=0.5)
    half = Checkpoint(tmp_path / "half").read("model.norm.weight")
    assert torch.allclose(half, (expected["model.norm.weight"] + Checkpoint(base).read("model.norm.weight")) / 2)
    consolidate(str(folder / case), str(tmp_path / "none"), start=str(base), alpha=0)
    assert all(torch.equal(Checkpoint(tmp_path / "none").read(n), Checkpoint(base).read(n)) for n in stock.tensors)


def test_a_base_from_elsewhere_is_refused(written: tuple[Path, Path, int], tmp_path: Path) -> None:
    _, folder, _ = written
    other = make_base(tmp_path / "other", "text", seed=1)
    with pytest.raises(UserError, match="was frozen, and is not that of"):
        consolidate(str(folder / name_of(3, "bf16", False)), str(tmp_path / "stock"), start=str(other))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_layout(written: tuple[Path, Path, int], stage: int, tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    _, folder, _ = written
    case = name_of(stage, "bf16", True)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / case / "second"), output_folder=str(tmp_path / "universal"),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=False, inject_missing_state=True,
        )
    )  # fmt: skip
    expected = load_file(folder / f"{case}.safetensors")
    zero = ZeroCheckpoint(tmp_path / "universal")
    assert set(zero.trained) - {"lm_head.weight"} == set(expected)  # the frozen embedding's second name
    for name, tensor in expected.items():
        assert torch.equal(zero.trained[name].load().view(tensor.shape), tensor), name


def test_missing_and_unsound_files(written: tuple[Path, Path, int], tmp_path: Path) -> None:
    _, folder, world_size = written
    source = folder / name_of(2, "bf16", True) / "second"
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    if world_size > 1:
        (tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
        with pytest.raises(UserError, match=f"{world_size - 1} of {world_size} ranks"):
            ZeroCheckpoint(tmp_path)


class Touch:
    """A pickle that would create a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_pickle_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    torch.save({"module": Touch(tmp_path / "created")}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="not a sound DeepSpeed checkpoint"):
        ZeroCheckpoint(tmp_path)
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Touch(tmp_path / "created")))
    with pytest.raises(UserError, match="not a sound DeepSpeed checkpoint"):
        ZeroCheckpoint(tmp_path)
    assert not (tmp_path / "created").exists()


class ByName:
    """Pickled as Python 3.11.2, Debian 12's, does it with members of an enumeration."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (ZeroStageEnum, self.name)


def test_a_member_by_name_is_read_and_nothing_else_by_name(tmp_path: Path) -> None:
    vector = {"partition_count": 1, "fp32_flat_groups": [torch.arange(6.0)]}
    shapes = [{"model.a": torch.Size([2, 3])}]
    torch.save({"param_shapes": shapes}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": vector | {"zero_stage": ByName("weights")}}, file)
    zero = ZeroCheckpoint(tmp_path)
    assert zero.stage == 3 and zero.trained["model.a"].load().tolist() == [[0, 1, 2], [3, 4, 5]]
    for name in ("mro", "__subclasses__", "from_bytes"):
        torch.save({"optimizer_state_dict": vector | {"zero_stage": ByName(name)}}, file)
        with pytest.raises(UserError, match="not a sound DeepSpeed"):
            ZeroCheckpoint(tmp_path)
