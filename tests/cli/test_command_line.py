"""Mistakes: one line, exit code 2, before anything is done, and nothing left behind."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from grow import __version__
from grow.methods import METHODS, read_recipe
from grow.methods.rates import default_rate
from tests.helpers.tiny import ROOT, grow, make_base, make_data, make_recipe, run

RECIPES = sorted((ROOT / "recipes").glob("gemma*/*.yaml"))  # a study's grid is no recipe


def mistake(*arguments: str | Path) -> str:
    done = grow(*arguments, code=2)
    (line,) = done.stderr.splitlines()
    assert done.stdout == "" and line.startswith("grow: ")
    return line


def test_help_is_quick() -> None:
    shown = run(sys.executable, "-X", "importtime", "-m", "grow", "--help")
    loaded = {line.split("|")[-1].strip() for line in shown.stderr.splitlines() if line.startswith("import time:")}
    assert "grow.cli.main" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "deepspeed", "datasets"}, "seconds, before a word is shown"
    commands = (
        "plan",
        "expand",
        "verify",
        "train",
        "consolidate",
        "eval",
        "report",
        "rank",
        "effective-rank",
        "find-alpha",
    )
    for command in commands:
        assert command in shown.stderr + shown.stdout
        text = grow(command, "--help")
        assert "Example: " in text.stderr + text.stdout


def test_plan_and_expand_say_what_they_did(text_base: Path, tmp_path: Path) -> None:
    planned = json.loads(grow("plan", text_base, "--layers", "0,2-3", "--json").stdout)
    assert planned["layers"] == [0, 2, 3]
    assert planned["added_parameters"] == 3 * 3 * 32 * 48
    made = grow("expand", text_base, tmp_path / "12", "--json")  # a name that looks like a number
    assert json.loads(made.stdout.splitlines()[-1])["added_bytes"] == 4 * 3 * 32 * 48 * 2
    assert (tmp_path / "12" / "config.json").exists()
    assert "bit for bit" in grow("verify", tmp_path / "12", "--base", text_base, "--forward").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["expnd"], "did you mean expand?"),
        (["expand", "{base}"], "OUT is missing"),
        (["expand", "{base}", "{out}", "--layer", "1"], "did you mean --layers?"),
        (["expand", "{base}", "{out}", "--layers", "2,9"], "layer 9 does not exist; the model has layers 0-3"),
        (["expand", "{base}", "{out}", "--layers", "3-1"], "backwards"),
        (["expand", "{base}", "{out}", "--factor", "1"], "at least 2"),
        (["expand", "{base}", "{out}", "--factor", "2", "--factor", "3"], "given twice"),
        (["expand", "{base}", "{out}", "extra"], "'extra' is too much"),
        (["expand", "{base}", "{base}"], "already there"),
        (["expand", "{base}", "{base}", "--keep"], "has not grown in the MLPs of 4 layers (0-3), 2 times as wide"),
        (["expand", "{out}", "{out}2"], "no such folder"),
        (["expand", "{data}", "{out}"], "config.json"),
        (["consolidate", "{base}", "{out}"], "nothing to consolidate"),
        (["verify", "{base}", "--forward"], "--base"),
        (["preview", "{recipe}", "--data", "rows.csv"], "rows.csv: no such file; it is looked for from"),
        (["report", "--out", "{out}"], "at least one run"),
        (["eval", "{base}", "--recipe", "{out}"], "no recipe there"),
        (["eval", "{base}"], "name what to score it on"),
        (["eval", "{base}", "--recipe", "{recipe}", "--metric", "bleu"], "bleu is not a metric"),
        (["eval", "{base}", "--recipe", "{recipe}", "--metric", "accuracy"], "go together"),
        (["rank", "--out", "{out}"], "needs a training run"),
        (["rank", "{base}", "--by", "updates", "--out", "{out}"], "did you mean update?"),
        (["effective-rank", "{base}", "--out", "{out}"], "nothing to consolidate"),
        (["find-alpha", "{base}", "--max-kl", "0"], "more than 0"),
        (["train", "{recipe}", "--max_step", "3"], "did you mean --max_steps?"),
        (["train", "{recipe}", "--max_steps", "many"], "max_steps: 'many'"),
        (["train", "{recipe}", "--method", "g_frieze"], "did you mean g_freeze?"),
        (["train", "{recipe}"], "grow expand"),
        (["train", "{recipe}", "--method", "sft", "--per_device_train_batch_size", "3"], "not a multiple"),
        (["train", "{recipe}", "--method", "sft", "--data", "{out}"], "no such folder of data"),
        (["train", "{recipe}", "--method", "sft", "--prompt", "{{nothing}}"], "is not among the columns"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], says: str, text_base: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    recipe = make_recipe(tmp_path / "recipe.yaml", text_base, tmp_path / "grown", data, stage=2)
    before = sorted(tmp_path.rglob("*"))
    places = {"base": text_base, "out": tmp_path / "out", "data": data, "recipe": recipe}
    assert says in mistake(*(argument.format(**places) for argument in arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_decoder_mlps_is_refused(tmp_path: Path) -> None:
    import transformers

    small = transformers.OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, ffn_dim=8)
    transformers.OPTForCausalLM(small).save_pretrained(tmp_path / "opt")
    assert "no MLP in it" in mistake("expand", tmp_path / "opt", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_grown_checkpoint_that_is_there_is_the_one_that_was_meant(text_base: Path, tmp_path: Path) -> None:
    """Of this base, whose every tensor's first row is looked at, and in these layers by this factor."""
    data, grown = make_data(tmp_path / "data"), tmp_path / "grown"
    recipe = make_recipe(tmp_path / "recipe.yaml", text_base, grown, data, stage=2)
    run("launch/expand.sh", recipe, LAYERS="1-2")
    assert "is there already" in run("launch/expand.sh", recipe, LAYERS="1,2").stdout
    assert run("launch/expand.sh", recipe).stdout == ""
    for other in ({"LAYERS": "1"}, {"FACTOR": "3", "LAYERS": "1-2"}):
        assert "has not grown in the MLPs" in run("launch/expand.sh", recipe, code=2, **other).stderr
    grow("train", recipe, "--check")
    other = make_base(tmp_path / "other", "text", seed=1)
    assert f"did not grow from {other}" in mistake("train", recipe, "--check", "--base", other)
    grow("train", recipe, "--check", "--base", tmp_path / "nowhere")  # which cannot be looked at


def test_a_recipe_with_an_unknown_field(text_base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, tmp_path, 2, learning_rat=1)
    assert "learning_rat is not a field; did you mean learning_rate?" in mistake("train", recipe)


def test_train_script_passes_mistakes_on(tmp_path: Path) -> None:
    done = run("launch/train.sh", tmp_path / "nowhere.yaml", code=2)
    assert done.stderr.strip() == f"grow: {tmp_path / 'nowhere.yaml'}: no recipe there (No such file or directory)"


@pytest.mark.parametrize("script", ["train", "expand", "consolidate", "prepare"])
def test_a_script_without_its_recipe(script: str) -> None:
    done = run(f"launch/{script}.sh", "--method", "sft", code=2)
    assert done.stderr.strip() == f"{script}.sh: name the recipe first: {script}.sh RECIPE --method sft"


def test_what_cannot_be_fetched_is_one_line(tmp_path: Path) -> None:
    """Nothing listens there: as on a node without network."""
    recipe = make_recipe(tmp_path / "r.yaml", Path("some/model"), tmp_path, make_data(tmp_path / "data"), 2)
    done = run("launch/prepare.sh", recipe, code=2, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"))
    assert re.search(r"^grow: some/model: cannot be fetched .*is there network", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_sound(path: Path, method: str) -> None:
    recipe = read_recipe(str(path), {"method": method})
    rate = recipe.learning_rate if recipe.learning_rate is not None else default_rate(method, 1)
    assert isinstance(rate, float) and Path(recipe.deepspeed).is_file()
    assert method in recipe.output_dir


SOURCED = ("common.sh", "allocation.sh", "hosts.sh")
SCRIPTS = [path for path in sorted(ROOT.glob("*/*.sh")) if path.name not in SOURCED]


def test_the_version_is_said() -> None:
    assert grow("--version").stdout.strip() == __version__


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_help(script: Path) -> None:
    assert script.name in run(script, "--help").stdout


def test_one_table_has_every_variable() -> None:
    """That a script's help names, and no other."""
    listed = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "slurm/README.md").read_text(), re.MULTILINE)
    assert listed == sorted(set(listed))
    helps = [run(script, "--help").stdout.partition("\nVariables")[2] for script in SCRIPTS]
    lines = re.findall(r"^ *([A-Z_]{2,}(?:, [A-Z_]{2,})*)(?=[: ])", "\n".join(helps), re.MULTILINE)
    named = {name for line in lines for name in line.split(", ")}
    assert len(named) > 30 and named <= set(listed), named - set(listed)
    text = "".join(path.read_text() for path in ROOT.glob("*/*.sh"))
    assert not [name for name in listed if not re.search(rf"\b{name}\b", text)]


def test_a_step_of_the_demo_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    """And where the others are; the fetching is a stand-in."""
    (bin_ := tmp_path / "bin").mkdir()
    fetch = f'*fetch.py*) for n in {{1..30}}; do echo line $n; done; exit 3 ;; *) exec {sys.executable} "$@" ;;'
    (bin_ / "python").write_text(f'#!/bin/bash\ncase "$*" in {fetch} esac\n')
    (bin_ / "grow").symlink_to("python")
    (bin_ / "python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / "installed-requirements.txt")
    said = run("launch/demo.sh", code=3, VENV=str(tmp_path), OUT=str(tmp_path / "out")).stderr.splitlines()
    assert said[1:-1] == [f"line {n}" for n in range(11, 31)]
    assert said[-1].endswith(f"failed (exit 3); all of its output is in {tmp_path}/out/demo.log")
