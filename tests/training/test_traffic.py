"""What `plan RECIPE` says that ranks send each other is what DeepSpeed counts."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grow.checkpoint.expand import expand
from grow.methods import read_recipe
from grow.training.footprint import describe_run, sent
from tests.helpers.running import rank_here, start
from tests.helpers.tiny import ROOT, make_recipe

STEPS, RANKS = 5, 2


def counting_rank(recipe: Path, *rank: Any) -> None:
    """A rank that notes after every step what DeepSpeed's logger has counted until then, in bytes by collective.

    The logger sees every collective but those of accelerate and of torch itself, which gather some numbers for the
    log. What it calls the size of an all-gather is what a rank puts in.
    """
    import deepspeed

    step, totals = deepspeed.DeepSpeedEngine.step, []

    def counted(engine: Any, *arguments: Any, **more: Any) -> None:
        step(engine, *arguments, **more)
        found: Counter[str] = Counter()
        for name, sizes in deepspeed.comm.comm.comms_logger.comms_dict.items():
            whole = RANKS if name.startswith("all_gather") else 1
            for part in ("all_reduce", "reduce_scatter", "all_gather"):
                if name.startswith(part):
                    found[part] += whole * sum(size * records[0] for size, records in sizes.items())
        totals.append(found)
        recipe.with_suffix(".json").write_text(json.dumps(totals))

    deepspeed.DeepSpeedEngine.step = counted
    rank_here(recipe, *rank)


@pytest.mark.parametrize(
    ("stage", "method", "fields", "zero"),
    [
        (1, "sft", {}, {}),
        (2, "g_freeze", {}, {}),
        (3, "g_freeze", {"dtype": "float32"}, {"stage3_max_reuse_distance": 0}),
        pytest.param(1, "g_freeze", {"dtype": "float32"}, {}, marks=pytest.mark.full),
        pytest.param(2, "sft", {}, {}, marks=pytest.mark.full),
        pytest.param(3, "sft", {}, {}, marks=pytest.mark.full),
        pytest.param(3, "g_train", {}, {}, marks=pytest.mark.full),
        pytest.param(3, "g_freeze", {"gradient_checkpointing": True}, {}, marks=pytest.mark.full),
        pytest.param(3, "sft", {"gradient_checkpointing": True}, {}, marks=pytest.mark.full),
    ],
)
def test_ranks_move_what_the_plan_says(
    text_base: Path, sums: Path, stage: int, method: str, fields: dict[str, Any], zero: dict[str, int], tmp_path: Path
) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    config = json.loads((ROOT / "grow" / "training" / "deepspeed" / f"zero{stage}.json").read_text())
    config["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False, "debug": False}
    if stage == 3:
        # In proportion to a model of 50 thousand parameters: with the defaults all of it would stay on every rank.
        small = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 1000}
        config["zero_optimization"] |= small | zero
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    fields = {"dtype": "bfloat16", "deepspeed": str(tmp_path / "deepspeed.json"), "max_steps": STEPS} | fields
    quiet = {"save_steps": 100, "eval_steps": 100}  # what is counted is training
    recipe = make_recipe(
        tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, stage, method=method, **quiet, **fields
    )
    planned = describe_run(read_recipe(str(recipe)), RANKS)
    assert planned["micro_batches"] == 2
    start(recipe, RANKS, counting_rank)
    *_, before, after = json.loads(recipe.with_suffix(".json").read_text())
    found = {name: after.get(name, 0) - before.get(name, 0) for name in ("all_reduce", "reduce_scatter", "all_gather")}
    moved = planned["moved"][str(stage)]
    assert found == pytest.approx({name: moved[name] for name in found}, rel=0.1, abs=200), "and flags and norms"
    assert sent(found, RANKS) == pytest.approx(moved["sent"], rel=0.1)
