"""Five lines are a recipe: everything else has a default, and a run that has begun keeps what it began with."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.methods import METHODS, read_recipe
from grow.methods.rates import default_rate
from grow.training.start import with_learning_rate
from tests.helpers.running import Toy, here, train
from tests.helpers.tiny import run

QUICK = {"max_steps": 2, "max_length": 32, "train_batch_size": 2, "dtype": "float32", "logging_steps": 1}


def write(path: Path, base: Path, data: Path, **fields: Any) -> Path:
    templates = {"prompt": "{question}", "completion": "{answer}"}
    recipe = {"base": str(base), "data": str(data), **templates, "output_dir": str(path.parent / "run")} | fields
    path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))
    return path


def as_flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def test_five_lines(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", text_base, sums)
    assert len(recipe.read_text().splitlines()) == 5
    said = run("launch/train.sh", recipe, *as_flags(QUICK)).stdout
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["recipe"]["learning_rate"] == 5e-5 and facts["deepspeed"]["zero_optimization"]["stage"] == 1
    assert facts["recipe"]["grown"] == str(tmp_path / "run" / "grown") and "2 steps" in said

    # The growth is one file beside links to the base.
    grown = tmp_path / "run" / "grown"
    assert not verify(str(grown), str(text_base))["problems"]
    (shard,) = grown.glob("model-*.safetensors")
    assert os.path.samefile(shard, text_base / "model.safetensors")
    assert len(list(grown.glob("growth-*.safetensors"))) == 1
    assert "done already" in run("launch/train.sh", recipe, *as_flags(QUICK)).stdout


def test_layers_and_factor(text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path / "r.yaml", text_base, sums, layers="1-2", factor=3)
    planned = json.loads(here(capsys, "plan", recipe, "--json"))
    assert not (tmp_path / "run").exists(), "a plan and a check make nothing"
    here(capsys, "train", recipe, "--check")
    assert not (tmp_path / "run" / "grown").exists()
    assert "no grown checkpoint there" in here(capsys, "train", recipe, code=2)
    here(capsys, "train", recipe, "--check", "--expand")
    config = json.loads((tmp_path / "run" / "grown" / "config.json").read_text())
    assert (config["growth"]["layers"], config["growth"]["factor"]) == ([1, 2], 3)
    assert json.loads(here(capsys, "plan", recipe, "--json")) == planned
    here(capsys, "train", recipe, "--check", "--expand")
    assert "otherwise than layers 1, factor 3" in here(capsys, "train", recipe, "--check", "--layers=1", code=2)
    assert "no grown checkpoint there" in here(capsys, "train", recipe, "--check", "--grown", tmp_path / "x", code=2)
    here(capsys, "expand", text_base, tmp_path / "other", "--attention", "queries")
    other = ("--check", "--grown", tmp_path / "other", f"--output_dir={tmp_path}/c")
    assert "give `grown` another folder" in here(capsys, "train", recipe, *other, code=2)
    here(capsys, "train", recipe, *other, "--attention=queries", "--layers=none", "--factor=2")
    assert "does not exist" in here(
        capsys, "train", recipe, "--check", f"--output_dir={tmp_path}/b", "--layers=9", code=2
    )
    assert "--check" in here(capsys, "train", recipe, "--expand", code=2)
    heads = write(tmp_path / "heads.yaml", text_base, sums, attention="queries", output_dir=str(tmp_path / "heads"))
    trained = [
        json.loads(here(capsys, "plan", heads, *more, "--json"))["trained_parameters"]
        for more in ((), ("--attention=", "--layers=all"), ("--attention=heads", "--attention-layers=1"))
    ]
    assert len(set(trained)) == 3, "what is said replaces what the recipe says"
    settings = ("--method=g_lora", "--lora_targets=q_proj,o_proj", "--lora_rank=2")
    here(capsys, "train", heads, "--check", "--expand", *settings)
    named = ("--grown", tmp_path / "elsewhere", f"--output_dir={tmp_path}/d")
    assert "--layers=none --factor=2 --attention=queries" in here(capsys, "train", heads, "--check", *named, code=2)


def test_expanded_by_the_script_of_a_job(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """launch/expand.sh goes by the recipe, or by LAYERS, which a pilot's ranking is handed in by."""
    recipe = write(tmp_path / "r.yaml", text_base, sums, layers="1-2")
    run("launch/expand.sh", recipe)
    assert json.loads((tmp_path / "run" / "grown" / "config.json").read_text())["growth"]["layers"] == [1, 2]
    here(capsys, "train", recipe, "--check")
    other = write(tmp_path / "s.yaml", text_base, sums, output_dir=str(tmp_path / "other"))
    run("launch/expand.sh", other, LAYERS="0")
    assert "give --factor or --layers" in run("launch/expand.sh", recipe, LAYERS="0", code=2).stderr
    assert json.loads((tmp_path / "other" / "grown" / "config.json").read_text())["growth"]["layers"] == [0]
    here(capsys, "train", other, "--check")
    gone = ("--base", tmp_path / "gone", "--learning_rate=1e-3")
    here(capsys, "train", recipe, "--check", *gone)  # its base is inside


def test_a_run_keeps_what_it_began_with(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Defaults may become others; a run that named neither rate nor stage resumes with those it began with."""
    recipe = write(tmp_path / "r.yaml", text_base, sums, method="sft", **QUICK | {"max_steps": 1})
    began = write(
        tmp_path / "began.yaml", text_base, sums, method="sft", learning_rate=1e-3, deepspeed="zero2", **QUICK
    )
    train(began, 1)
    settings = with_learning_rate(read_recipe(str(recipe)))
    assert settings.learning_rate == 1e-3 and settings.zero["stage"] == 2
    other = with_learning_rate(read_recipe(str(recipe), {"output_dir": str(tmp_path / "other")}))
    assert other.learning_rate == 2e-5 and other.zero["stage"] == 1
    of_others = write(tmp_path / "of.yaml", text_base, sums, method="sft", learning_rate={"lora": 1e-3})
    assert with_learning_rate(read_recipe(str(of_others), {"output_dir": str(tmp_path / "of")})).learning_rate == 2e-5
    with pytest.raises(UserError, match="learning_rate: stf is not a method; did you mean"):
        read_recipe(str(write(tmp_path / "of.yaml", text_base, sums, learning_rate={"stf": 1e-3})))


def test_one_recipe_serves_methods_with_a_switch_and_without(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", text_base, sums, switch="row", attention="queries")
    assert read_recipe(str(recipe)).growth["layers"] == "none"
    switches = {method: read_recipe(str(recipe), {"method": method}).switch for method in ("g_train", "lora", "sft")}
    assert switches == {"g_train": "row", "lora": "row", "sft": ""}
    asked = read_recipe(str(recipe), {"method": "sft", "switch": "row"})
    with pytest.raises(UserError, match="leaves no base"):
        asked.make_method().check(asked)


def test_rates() -> None:
    for method in METHODS:
        small, large = default_rate(method, 270_000_000), default_rate(method, 4_000_000_000)
        assert 0 < large <= small < 1e-2
    assert default_rate("g_freeze", 1, times=3) == 3 * default_rate("g_freeze", 1)
    with pytest.raises(UserError, match="no default for toy"):
        default_rate("toy", 1)
    assert Toy  # a method of one's own names its rate in the recipe


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"prompt": "2+3=", "completion": "5"}, "2+3=5"),
        ({"messages": [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]}, "2+3=5"),
    ],
)
def test_columns_of_the_usual_names_need_no_templates(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], shown: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    chat = tmp_path / "chat.jinja"
    chat.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    more = {"chat_template": str(chat)} if "messages" in row else {}
    recipe = write(
        tmp_path / "r.yaml", text_base, tmp_path / "data", prompt=None, completion=None, method="sft", **more
    )
    (found,) = json.loads(here(capsys, "preview", recipe, "--json"))["rows"]
    assert shown in found["text"] and found["learnt"].startswith("5")

    (tmp_path / "data" / "train.jsonl").write_text('{"question": "2+3=", "answer": "5"}\n')
    other = write(tmp_path / "s.yaml", text_base, tmp_path / "data", prompt=None, completion=None, method="sft")
    line = here(capsys, "preview", other, f"--data={tmp_path / 'data' / 'train.jsonl'}", code=2)
    assert "templates of its columns (question, answer)" in line


def test_where_deepspeeds_files_once_were(text_base: Path, sums: Path, tmp_path: Path) -> None:
    for name in ("zero3", "../deepspeed/zero3.json", "/gone/recipes/deepspeed/zero3.json"):
        assert read_recipe(str(write(tmp_path / "r.yaml", text_base, sums, deepspeed=name))).zero["stage"] == 3
    for name in ("zero4", "deepspeed/mine.json"):
        with pytest.raises(UserError, match="no such file"):
            read_recipe(str(write(tmp_path / "r.yaml", text_base, sums, deepspeed=name)))
