"""What `plan RECIPE` says of memory and disk is what a run takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from grow.checkpoint.expand import expand
from grow.methods import read_recipe
from grow.training.footprint import describe_run
from tests.helpers.pictures import FIELDS, make_pictures
from tests.helpers.running import here, rank_here, start
from tests.helpers.tiny import make_base, make_recipe


def bytes_of(tensors: Any) -> int:
    """What storages take, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def measure(engine: Any) -> dict[str, int]:
    """Bytes of an engine."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    if engine.zero_optimization_stage() == 3:
        weights = [*(p.data for p in parameters), *(p.ds_tensor for p in parameters)]
        gradients = [optimizer.grad_partitions_flat_buffer]
        masters = optimizer.fp32_partitioned_groups_flat
    else:
        weights = [*(p.data for p in parameters), *optimizer.bit16_groups_flat]
        gradients = [g for p in parameters for g in (p.grad, getattr(p, "grad_accum", None))]
        gradients += [g for group in optimizer.averaged_gradients.values() for g in group or ()]
        masters = optimizer.single_partition_of_fp32_groups
    moments = [v for state in optimizer.optimizer.state.values() for v in state.values() if v.dim()]
    return {"weights": bytes_of(weights), "gradients": bytes_of(gradients), "optimizer": bytes_of([*masters, *moments])}


def measured_rank(recipe: Path, *rank: Any) -> None:
    """A rank that notes the most of each that it has had after a micro-batch."""
    import deepspeed

    backward, most = deepspeed.DeepSpeedEngine.backward, dict[str, int]()

    def measured(engine: Any, *arguments: Any, **more: Any) -> Any:
        loss = backward(engine, *arguments, **more)
        for name, size in measure(engine).items():
            most[name] = max(size, most.get(name, 0))
        recipe.with_suffix(".json").write_text(json.dumps(most))
        return loss

    deepspeed.DeepSpeedEngine.backward = measured
    rank_here(recipe, *rank)


SOME: dict[str, Any] = {"layers": "1,2"}


@pytest.mark.parametrize(
    ("stage", "method", "dtype", "grows"),
    [
        (1, "sft", "float32", SOME),
        (2, "g_freeze", "bfloat16", SOME),
        (3, "g_train", "bfloat16", SOME),
        (2, "g_freeze", "bfloat16", {"attention": "queries"}),
        (2, "g_freeze", "bfloat16", {"tower": "vision", "train_projector": True}),
        pytest.param(1, "g_train", "bfloat16", {"attention": "heads"}, marks=pytest.mark.full),
        pytest.param(1, "g_freeze", "bfloat16", {"train_embedding": True}, marks=pytest.mark.full),
        pytest.param(1, "adapter", "bfloat16", SOME, marks=pytest.mark.full),
        pytest.param(2, "lora", "float32", SOME, marks=pytest.mark.full),
        pytest.param(3, "lora", "bfloat16", SOME, marks=pytest.mark.full),
        pytest.param(2, "g_lora", "bfloat16", SOME, marks=pytest.mark.full),
    ],
)
def test_a_run_takes_what_the_plan_says(
    text_base: Path, sums: Path, stage: int, method: str, dtype: str, grows: dict[str, Any], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"method": method, "dtype": dtype, "max_steps": 2}
    base, rows = text_base, sums
    if "tower" in grows:
        base, rows = make_base(tmp_path / "base", "multimodal"), make_pictures(tmp_path / "pictures")
        fields |= FIELDS | grows
    expand(str(base), str(tmp_path / "grown"), **grows)
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path / "grown", rows, stage, **fields)
    planned = describe_run(read_recipe(str(recipe)), 2)
    start(recipe, 2, measured_rank)
    found = json.loads(recipe.with_suffix(".json").read_text())
    # A tower so small has gradients of 2 kB, beside which a buffer that is freed a moment later shows.
    spare = 1024 if "tower" in grows else 0
    assert planned["stages"][str(stage)] == pytest.approx(found, rel=0.1, abs=spare)
    files = list((tmp_path / "run" / "checkpoint-2").rglob("*_states.pt"))
    assert sum(file.stat().st_size for file in files) == pytest.approx(
        planned["checkpoint_bytes"], rel=0.1, abs=45_000 * len(files)
    ), "and tens of kB of names in each file"
    assert (
        planned["trained_parameters"] == json.loads((tmp_path / "run" / "run.json").read_text())["trained_parameters"]
    )


def test_what_methods_hold_beside_is_counted(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = str(make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, dtype="bfloat16"))
    plain, held, ewc = (
        describe_run(read_recipe(recipe, fields), 2)
        for fields in ({"method": "sft"}, {"method": "sft", "kl_weight": 1.0, "kl_text": "x"}, {"method": "ewc"})
    )
    more = [there["stages"]["2"]["weights"] - plain["stages"]["2"]["weights"] for there in (held, ewc)]
    assert more == [2 * plain["parameters"], 6 * plain["parameters"]], (
        "the base; EWC's Fisher information in fp32 and it"
    )


def test_what_is_said(text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, method="sft")
    said = here(capsys, "plan", recipe, "--world-size", "8", "--save_total_limit", "3")
    assert "2, the recipe's" in said and "estimated" in said and "--signal" in said
    planned = json.loads(here(capsys, "plan", recipe, "--world-size", "8", "--save_total_limit", "3", "--json"))
    assert planned["disk_bytes"] == 4 * planned["checkpoint_bytes"]
    assert planned["stages"]["3 with CPU offload"]["optimizer"] == 0
    for words, message in (
        (["--world-size", "0"], "at least 1"),
        (["--world-size", "x"], "a number is needed"),
        (["--method", "g_freeze"], "grow expand"),
        (["--base", str(tmp_path / "none")], "no such folder"),
        (["--methud", "sft"], "did you mean --method"),
    ):
        error = here(capsys, "plan", recipe, *words, code=2)
        assert message in error
    assert "is for a recipe" in here(capsys, "plan", text_base, "--method", "sft", code=2)


def test_what_fits_a_gpu(text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The largest power of two for each ZeRO stage, of which the global batch is a multiple; or that nothing fits."""
    expand(str(text_base), str(tmp_path / "grown"))
    fields = {"method": "g_freeze", "train_batch_size": 48, "max_length": 256}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, **fields)
    sizes = []
    for gpu in ("1GB", "1100MB", "80GB"):
        planned = json.loads(here(capsys, "plan", recipe, "--gpu", gpu, "--json"))
        sizes.append(planned["largest_micro_batch"]["1"])
        assert set(planned["largest_micro_batch"]) == set(planned["stages"])
    assert sizes == [0, 8, 16]
    assert "ZeRO-1 does not fit" in here(capsys, "plan", recipe, "--gpu", "1GB")
    assert "largest" not in here(capsys, "plan", recipe)
    assert "write a GPU's memory with its unit" in here(capsys, "plan", recipe, "--gpu", "80", code=2)
    assert "--gpu some: a size is needed" in here(capsys, "plan", recipe, "--gpu", "some", code=2)
    assert "--gpu is for a recipe" in here(capsys, "plan", text_base, "--gpu", "80GB", code=2)
