"""Each layer learns at its own rate, in every ZeRO stage, and a run goes on in the same bits."""

from pathlib import Path

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.zero import ZeroCheckpoint
from grow.errors import UserError
from grow.recipe import read_recipe
from grow.training.train import check_run
from tests.running import curve, start, train_and_resume
from tests.tiny import grow, make_base, make_recipe

pytestmark = pytest.mark.gpu

RATE, FACTORS = 1e-3, [2.0, 0.5, 1.0, 0.0]


def moved(run: Path, begin: Path) -> dict[str, float]:
    """How far the value of each trained parameter that moved most has moved."""
    before = Checkpoint(begin)
    (checkpoint,) = run.glob("checkpoint-*")
    return {
        name: (value.load() - before.read(name).float()).abs().max().item()
        for name, value in ZeroCheckpoint(checkpoint).trained.items()
        if ".trained." not in name  # which the start has by another name
    }


@pytest.mark.parametrize(
    ("method", "stage", "ranks"),
    [
        ("g_freeze", 2, 1),
        ("sft", 1, 2),
        *(pytest.param(method, 3, 2, marks=pytest.mark.full) for method in ("g_train", "sft")),
    ],
)
def test_adams_first_step_is_the_rate(
    method: str, stage: int, ranks: int, text_base: Path, sums: Path, tmp_path: Path
) -> None:
    expand(str(text_base), str(tmp_path / "grown"))
    fields = {"method": method, "max_steps": 1, "learning_rate": RATE, "weight_decay": 0.0, "dtype": "float32"}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, stage, layer_rates=FACTORS, **fields)
    start(recipe, ranks)
    begin = text_base if method == "sft" else tmp_path / "grown"
    far = moved(tmp_path / "run", begin)
    for layer, factor in enumerate(FACTORS):
        own = {name: value for name, value in far.items() if f".layers.{layer}." in name}
        assert own and all(value == pytest.approx(RATE * factor, rel=0.02) for value in own.values()), own
    if method == "sft":
        assert far["model.embed_tokens.weight"] == pytest.approx(RATE, rel=0.02), "in no layer"


def test_a_run_goes_on(sums: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "multimodal")
    expand(str(base), str(tmp_path / "grown"), layers="0,2")
    factors = {"layer_rates": [0.5, 4.0, 2.0, 1.0], "dtype": "float32", "report_to": "none"}
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path / "grown", sums, 2, method="g_freeze", **factors)
    trained = train_and_resume(recipe, 1)
    assert len(trained) == 6 and all(torch.isfinite(value).all() for value in trained.values())
    rates = [entry["learning_rate"] for entry in curve(tmp_path / "run" / "checkpoint-4")]
    assert 0 <= rates[-1] < rates[0] == pytest.approx(read_recipe(str(recipe)).learning_rate), "the recipe's is logged"


def test_all_that_trains_at_no_rate(text_base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="0,2")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, method="g_freeze")
    error = grow("train", recipe, "--layer_rates", "0,1,0,1", code=2).stderr
    assert "grow: layer_rates: 0 for every layer that trains" in error


@pytest.mark.parametrize(
    ("factors", "says"),
    [("1,2,3", "3 factors; the model has 4 layers"), ("0,0,0,0", "one at least > 0"), ("1,1,-1,1", "0 or more")],
)
def test_factors_that_do_not_fit(factors: str, says: str, text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft")
    with pytest.raises(UserError, match=says):
        check_run(read_recipe(str(recipe), {"layer_rates": factors}))
