"""Several data sets in one run: each with its share, resumed in the same bits, and named where something is wrong."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grow.checkpoint.expand import expand
from grow.data.of_recipe import read_mixed
from grow.errors import UserError
from grow.evaluation.evaluate import evaluate
from grow.methods import read_recipe
from tests.helpers.running import here, train, train_and_resume
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
    # Where the folders are does not matter, nor how their names are typed.
    shutil.copytree(text, tmp_path / "moved")
    moved = {str(tmp_path / "moved"): 0.25, f"{sums}/../{sums.name}": 0.25}
    for mix, message in ((moved, ""), ({str(text): 0.25, str(tmp_path / "moved"): 0.25}, "other contents of mix")):
        (tmp_path / "run" / "COMPLETE").unlink()
        again = make_recipe(tmp_path / "again.yaml", text_base, tmp_path / "grown", sums, 2, **(fields | {"mix": mix}))
        with pytest.raises(AssertionError, match=message) if message else contextlib.nullcontext():
            train(again, 1)
    alone = make_recipe(tmp_path / "alone.yaml", text_base, tmp_path / "grown", sums, 2)
    assert history[-1]["epoch"] > 0 and read_recipe(str(alone)).mix == {}


def test_how_rows_that_are_mixed_in_become_text(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """By the recipe's template with its end, as its own rows; by a prompt and a completion before a text."""
    own = tmp_path / "own"
    own.mkdir()
    for split in ("train", "validation"):
        (own / f"{split}.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    (tmp_path / "both").mkdir()
    row = {"text": "whole", "prompt": "asked ", "completion": "said"}
    (tmp_path / "both" / "train.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(text_base)

    def learnt(data: Path, mixed: Path, **fields: str) -> str:
        words = {"data": str(data), "mix": f"{mixed}=0.5", **fields}
        recipe = read_recipe(str(make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2)), words)
        (packed,) = read_mixed(recipe, tokenizer).values()
        return str(tokenizer.decode([token for token in packed.examples[0].labels if token >= 0]))

    assert learnt(own, own, prompt="", completion="{text}") == "a b<eos>"
    assert learnt(sums, tmp_path / "both") == "said<eos>"
    assert learnt(sums, own) == "a b"


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


def test_what_is_mixed_in_contaminates_too(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Replay of rows like those of retention is what it is for: those rows are not scored."""
    rows = [{"prompt": f"What comes after {n}?", "completion": f" {n + 1}, of course"} for n in range(12)]
    for split, part in {"test": rows, "train": rows[:5]}.items():
        (tmp_path / "known").mkdir(exist_ok=True)
        (tmp_path / "known" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    known = str(tmp_path / "known")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, retention=known, max_length=64)
    for mix, left_out in ((f"{known}=0.1", 5), ("", 0)):
        scores = evaluate(str(text_base), read_recipe(str(recipe), {"mix": mix}))["retention"]
        assert (scores["contaminated"], scores["rows"]) == (left_out, 12 - left_out)


def test_rows_that_are_weighed_are_of_one_data_set(text_base: Path, sums: Path, text: Path, tmp_path: Path) -> None:
    for method, message in (("flow", "mix: flow weighs the rows"), ("stm", "mix: stm masks tokens")):
        recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, method=method)
        found = read_recipe(str(recipe), {"mix": f"{text}=0.1"})
        with pytest.raises(UserError, match=message):
            found.make_method().check(found)
