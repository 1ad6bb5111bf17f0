"""Other layouts in training: layers of two widths, towers that text does not train, a fused gate, no gate."""

from pathlib import Path

import pytest

from grow.checkpoint.expand import expand
from grow.errors import UserError
from grow.methods import read_recipe
from grow.training.check import check_run
from tests.checkpoint.test_architectures import make
from tests.helpers.running import consolidate, train_and_resume
from tests.helpers.tiny import make_recipe, make_tokenizer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("kind", "method", "stage", "ranks"),
    [
        ("gemma4", "g_train", 1, 1),
        ("phi3", "g_train", 1, 1),
        ("phi", "g_train", 1, 1),
        pytest.param("starcoder2", "g_lora", 1, 1, marks=pytest.mark.full),
        pytest.param("phi", "g_freeze", 3, 2, marks=pytest.mark.full),
        pytest.param("phi3", "g_train", 3, 2, marks=pytest.mark.full),
        ("gemma4-e2b", "sft", 1, 1),
        ("gpt2", "g_train", 1, 1),
        pytest.param("pythia", "g_train", 1, 1, marks=pytest.mark.full),
        pytest.param("gpt2", "g_train", 3, 2, marks=pytest.mark.full),
        pytest.param("gemma4", "g_freeze", 3, 2, marks=pytest.mark.full),
        pytest.param("gemma4-e2b", "sft", 3, 2, marks=pytest.mark.full),
        pytest.param("gemma4-e2b", "g_freeze", 2, 2, marks=pytest.mark.full),
        pytest.param("gemma3n", "g_train", 2, 2, marks=pytest.mark.full),
    ],
)
def test_it_learns_and_resumes(kind: str, method: str, stage: int, ranks: int, sums: Path, tmp_path: Path) -> None:
    base = make(tmp_path / "base", kind)
    make_tokenizer(base)
    beside = {"attention": "queries"} if kind == "gemma4" else {}  # whose layers share keys and values
    expand(str(base), str(tmp_path / "grown"), layers="all", **beside)
    fields = {"method": method, "learning_rate": 3e-2}
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path / "grown", sums, stage, **fields)
    trained = train_and_resume(recipe, ranks)
    assert trained and not any("audio" in name or "vision" in name for name in trained)
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"))


def test_adapters_do_not_fit_matrices_that_lie_transposed(sums: Path, tmp_path: Path) -> None:
    base = make(tmp_path / "base", "gpt2")
    make_tokenizer(base)
    recipe = make_recipe(tmp_path / "r.yaml", base, base, sums, 1, method="lora")
    with pytest.raises(UserError, match="Conv1D"):
        check_run(read_recipe(str(recipe), {}))
