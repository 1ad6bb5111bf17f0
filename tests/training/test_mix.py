"""Several data sets in one run: each with its share, resumed in the same bits, and named where something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from grow.checkpoint.expand import expand
from grow.errors import UserError
from grow.methods import read_recipe
from tests.helpers.running import here, train_and_resume
from tests.helpers.tiny import make_recipe


@pytest.mark.gpu
def test_a_run_learns_from_several(text_base: Path, sums: Path, text: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    fields: dict[str, Any] = {"mix": {str(text): 0.25, str(sums): 0.25}, "dtype": "float32"}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, **fields)
    train_and_resume(recipe, 1)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["recipe"]["mix"] == fields["mix"]
    assert set(facts["data_checksums"]) == {"train", "validation", f"mix: {text}", f"mix: {sums}"}
    history = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    alone = make_recipe(tmp_path / "alone.yaml", text_base, tmp_path / "grown", sums, 2)
    assert history[-1]["epoch"] > 0 and read_recipe(str(alone)).mix == {}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("{sums}", "write MIX=NUMBER"),
        ("{sums}=1", "below 1 together"),
        ("{sums}=0.6,{text}=0.4", "below 1 together"),
        ("{sums}=0", "above 0"),
        ("{sums}=much", "is not what it takes"),
        ("{sums}/none=0.1", "no such folder"),
    ],
)
def test_a_share_that_makes_no_sense(
    mix: str, message: str, text_base: Path, sums: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2)
    line = here(capsys, "train", recipe, "--check", "--mix", mix.format(sums=sums, text=text), code=2)
    assert message in line


def test_rows_that_are_weighed_are_of_one_data_set(text_base: Path, sums: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, method="flow")
    found = read_recipe(str(recipe), {"mix": f"{text}=0.1"})
    with pytest.raises(UserError, match="mix: flow weighs the rows"):
        found.make_method().check(found)
