"""A switch is fitted before training, from the task's rows and text that the base writes, and goes with the growth."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import grow
from grow.checkpoint.metadata import read_growth
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.switch_record import switch_file, switch_of_run
from grow.cli.main import main
from grow.errors import UserError
from grow.model.loading import load
from grow.switch.fit import check_table
from tests.helpers.running import here, start, train
from tests.helpers.tiny import logits, make_recipe, tokens
from tests.helpers.tiny import run as script


def recipe_with(path: Path, base: Path, data: Path, **fields: Any) -> Path:
    """A recipe whose run makes its own grown checkpoint, in the upper layers."""
    # Its prompts are unlike what a random model writes, which has no words.
    wanted = {"switch": "row", "prompt": "~~~~~~~~{question}~~~~~~~~", "max_length": 64}
    recipe = make_recipe(path, base, path.parent / "grown", data, 1, **(wanted | fields))
    values = yaml.safe_load(recipe.read_text())
    del values["grown"]
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def begin(recipe: Path) -> str:
    assert main(["train", str(recipe), "--check", "--expand"]) == 0
    return train(recipe, 1)


def test_a_run_with_a_switch(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """From the recipe to a package on the base: the same decisions everywhere; the base where it is off."""
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums)
    said = begin(recipe)
    run = tmp_path / "run"
    record = switch_of_run(run)
    assert record is not None and record.kind == "row" and record.layer == 2
    assert "validation rows" in said and "a space after" in said and "at most 0.8% open it" in said
    facts = json.loads((run / "run.json").read_text())
    assert facts["recipe"]["layers"] == "upper" and facts["switch"]["facts"]["self_text"]["checksum"]
    assert json.loads((run / "grown" / "config.json").read_text())["growth"]["layers"] == [2, 3]

    here(capsys, "consolidate", run, tmp_path / "grown-trained", "--format", "grown")
    here(capsys, "growth", run, tmp_path / "package")
    here(capsys, "attach", text_base, tmp_path / "package", tmp_path / "attached")
    assert read_growth(tmp_path / "package")["switch"]["layer"] == 2
    said = here(capsys, "verify", tmp_path / "attached", "--base", text_base, "--forward")
    assert "it is trained; at α = 0" in said and said.count("bit for bit") == 2
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    prompt = tokenizer([f"<bos>~~~~~~~~3+{n}=~~~~~~~~" for n in range(2, 9)], return_tensors="pt").input_ids
    far = tokens(40)
    base = load(text_base)
    models = [load(tmp_path / "grown-trained"), load(tmp_path / "attached"), grow.load(run)]
    models.append(grow.attach(load(text_base), tmp_path / "package"))
    for model in models:
        model.requires_grad_(False)
        assert torch.equal(logits(model, input_ids=far), logits(base, input_ids=far))
        assert model.switched.tolist() == [False]
        found = logits(model, input_ids=prompt)
        assert model.switched.float().mean() > 0.5, "it opens for the task"
        assert torch.equal(found, logits(models[0], input_ids=prompt))
    saved = tmp_path / "saved"
    grow.save_growth(models[0], saved)
    assert read_growth(saved)["switch"] == read_growth(tmp_path / "package")["switch"]

    script("launch/consolidate.sh", recipe, LIMIT="4")
    scores = json.loads((tmp_path / "run-scores.json").read_text())["task"]
    assert scores["opened"] > 0 and (tmp_path / "run-switched" / "growth.json").is_file()
    assert load(tmp_path / "run-stock").config.intermediate_size == 2 * load(text_base).config.intermediate_size
    line = here(capsys, "consolidate", run, tmp_path / "stock", "--uniform", code=2)
    assert "--without-switch" in line and "--format grown" in line
    here(capsys, "consolidate", run, tmp_path / "stock", "--uniform", "--without-switch")
    with pytest.raises(grow.UserError, match="without_switch"):
        grow.to_stock(models[0], tmp_path / "stock-2", uniform=True)
    grow.to_stock(models[0], tmp_path / "stock-2", uniform=True, without_switch=True)
    # α is found for what is consolidated, which is always on.
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} is a number, and {n} again." * 4 for n in range(8)))
    words = ("find-alpha", tmp_path / "grown-trained", "--text", tmp_path / "text.txt", "--json")
    found = json.loads(here(capsys, *words).splitlines()[-1])
    assert found["switched"] and found["seen"][-1]["kl"] > 0 and "--without-switch" in found["next"]
    grow.set_switch(models[0], "on")
    stock = load(tmp_path / "stock-2").requires_grad_(False)
    assert torch.allclose(logits(stock, input_ids=far), logits(models[0], input_ids=far), atol=0.05)


def test_it_resumes_with_its_switch(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """A run that resumes takes the switch that it has; `fit-switch` replaces it, from the run or from the recipe."""
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums, retention=str(sums), probe_rows=8,
                         retention_prompt="{question}", retention_completion="{answer}")  # fmt: skip
    begin(recipe)
    run = tmp_path / "run"
    file = switch_file(run)
    before = file.read_bytes()
    shutil.rmtree(run / "checkpoint-4")
    (run / "COMPLETE").unlink()
    said = train(recipe, 1)
    assert file.read_bytes() == before and "validation rows" not in said, "it was not fitted again"
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    measured = [entry for entry in history if "retention_open" in entry]
    assert measured and all(entry["retention_open"] == 0 == entry["kl_from_base"] for entry in measured)

    off = tmp_path / "off"
    off.mkdir()
    (off / "test.jsonl").write_text("".join(json.dumps({"text": "!" * n}) + "\n" for n in range(9, 29)))
    line = here(capsys, "fit-switch", run, "--layer", "1", "--off", off, "--kind", "answer")
    assert str(run) in line
    record = switch_of_run(run)
    assert record is not None and (record.kind, record.layer, record.facts["off"]) == ("answer", 1, [str(off)])
    assert [entry["rows"] for entry in record.facts["table"] if entry["name"] == str(off)] == [10]
    here(capsys, "fit-switch", recipe)
    assert file.read_bytes() == before, "the same rows and numbers give the same switch"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such switch": ({"switch": "rows"}, "row"),
    "a call without text": ({"switch": "call:"}, "call:TEXT"),
    "a call that is not there": ({"switch": "call:Answer"}, "0 of 162"),
    "a method without a base": ({"method": "sft"}, "g_freeze"),
    "a token above growth": ({"switch": "token", "layers": "all"}, "--layers upper"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(text_base: Path, sums: Path, tmp_path: Path, capsys: Any, mistake: str) -> None:
    fields, expected = MISTAKES[mistake]
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums, **fields)
    assert main(["train", str(recipe), "--check", "--expand"]) in (0, 2)
    said = capsys.readouterr().err
    if expected not in said:
        with pytest.raises(AssertionError, match=re.escape(expected)):
            train(recipe, 1)
    assert not (tmp_path / "run" / "checkpoint-2").exists() and not switch_file(tmp_path / "run").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_few_rows(text_base: Path, tmp_path: Path, count: int) -> None:
    """Each variation has rows all the same."""
    data = tmp_path / "few"
    data.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(2, 2 + count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin(recipe_with(tmp_path / "r.yaml", text_base, data, max_steps=1))
    record = switch_of_run(tmp_path / "run")
    assert record is not None
    assert [line["rows"] for line in record.facts["table"][:2]] == [count, max(1, count // 2)]
    assert all(line["rows"] == 2 for line in record.facts["table"][2:13])


def test_a_task_that_cannot_be_told_apart(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """Validation rows that are unlike the training rows; and the task's own rows, which are to be left alone."""
    data = tmp_path / "data"
    shutil.copytree(sums, data)
    rows = [json.loads(line) for line in (sums / "validation.jsonl").read_text().splitlines()]
    other = [row | {"question": "what is it? " * (index % 3 + 1)} for index, row in enumerate(rows)]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    recipe = recipe_with(tmp_path / "r.yaml", text_base, data, prompt="{question}")
    assert main(["train", str(recipe), "--check", "--expand"]) == 0
    with pytest.raises(AssertionError, match="of the validation rows would open"):
        train(recipe, 1)
    assert not switch_file(tmp_path / "run").exists()
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums)
    assert main(["fit-switch", str(recipe), "--off", str(sums)]) == 2
    assert f"the task cannot be told apart from {sums}" in capsys.readouterr().err
    assert not switch_file(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "other", "message"),
    [
        ((4, 5), (1, 5), ""),
        ((3, 5), (0, 5), "60% of the validation rows"),
        ((5, 5), (2, 5), "apart from near text, 40%"),
        ((90, 100), (10, 100), ""),
        ((89, 100), (10, 100), "89% of the validation rows"),
        ((90, 100), (11, 100), "apart from near text, 11%"),
    ],
)
def test_one_text_of_a_few_tells_nothing(task: tuple[int, int], other: tuple[int, int], message: str) -> None:
    table = [
        {"kind": "task", "name": "validation rows", "rows": task[1], "open": task[0] / task[1]},
        {"kind": "other", "name": "near text", "rows": other[1], "open": other[0] / other[1]},
    ]
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_table(table, "row")


def test_mistakes_of_the_command(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums)
    assert "no run has begun" in here(capsys, "fit-switch", tmp_path, code=2)
    assert "0-3" in here(capsys, "fit-switch", recipe, "--layer", "7", code=2)
    assert "row, answer, token" in here(capsys, "fit-switch", recipe, "--kind", "line", code=2)
    assert "no such folder" in here(capsys, "fit-switch", recipe, "--off", tmp_path / "gone", code=2)


@pytest.mark.parametrize("kind", ["call:~~~~~~~~", "token", "answer"])
def test_other_kinds(text_base: Path, sums: Path, tmp_path: Path, kind: str) -> None:
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums, switch=kind)
    begin(recipe)
    model = grow.load(tmp_path / "run").requires_grad_(False)
    base, far = load(text_base), tokens(40)
    found = logits(model, input_ids=far)
    off = model.switched if kind == "token" else torch.zeros(1, 40, dtype=torch.bool)
    before = (off.long().cumsum(1) == 0)[0]
    assert before.any() and torch.equal(found[:, before], logits(base, input_ids=far)[:, before])


HEADS = {"attention": "heads", "attention_layers": "2,3", "method": "g_train"}


@pytest.mark.parametrize(
    ("stage", "growth"), [(1, {}), (3, {}), pytest.param(3, HEADS, marks=pytest.mark.full)], ids=str
)
def test_two_ranks(text_base: Path, sums: Path, tmp_path: Path, stage: int, growth: dict[str, str]) -> None:
    """Under ZeRO-3 too, where every rank gathers the branches whether its rows are on or off."""
    probe = {"retention": str(sums), "retention_prompt": "{question}", "retention_completion": "{answer}"}
    recipe = recipe_with(
        tmp_path / "r.yaml", text_base, sums, deepspeed=f"zero{stage}", probe_rows=6, **probe, **growth
    )
    assert main(["train", str(recipe), "--check", "--expand"]) == 0
    start(recipe, 2)
    history = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    measured = [entry for entry in history if "retention_open" in entry]
    assert measured and all(entry["retention_open"] == 0 == entry["kl_from_base"] for entry in measured)
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.1, "the validation rows are on"


@pytest.mark.parametrize(("where", "read"), [("2,3", 1), ("all", 2)])
def test_heads_of_attention(text_base: Path, sums: Path, tmp_path: Path, capsys: Any, where: str, read: int) -> None:
    """It reads the layer below those that grow, or in a first pass; off, the base's keys, values and outputs."""
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums, **HEADS | {"attention_layers": where})
    script("launch/expand.sh", recipe)
    said = train(recipe, 1)
    run = tmp_path / "run"
    record = switch_of_run(run)
    assert record is not None and record.layer == read and ("in the same pass" in said) == (where == "2,3")
    here(capsys, "growth", run, tmp_path / "package")
    here(capsys, "attach", text_base, tmp_path / "package", tmp_path / "attached")
    here(capsys, "verify", tmp_path / "attached", "--base", text_base)
    base, model, far = load(text_base), load(tmp_path / "attached").requires_grad_(False), tokens(40)
    assert torch.equal(logits(model, input_ids=far), logits(base, input_ids=far)) and not model.switched.any()
    grow.set_switch(model, "on")
    assert not torch.equal(logits(model, input_ids=far), logits(base, input_ids=far))
    if where == "all":
        assert "decide by row" in here(capsys, "fit-switch", recipe, "--kind", "token", code=2)


def test_a_lora_that_is_not_merged(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """In the upper layers, so that the layer below is the base's; loaded with its switch, and merged without."""
    recipe = recipe_with(tmp_path / "r.yaml", text_base, sums, method="lora", learning_rate=0.02)
    train(recipe, 1)
    run = tmp_path / "run"
    record = switch_of_run(run)
    assert record is not None and record.layer == 1, "below the lowest attention that has one"
    trained = list(Checkpoint.of_files(run, [run / "result" / "adapter_model.safetensors"]).tensors)
    assert trained and all(".layers.2." in name or ".layers.3." in name for name in trained)
    base, far = load(text_base), tokens(40)
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    prompt = tokenizer([f"<bos>~~~~~~~~3+{n}=~~~~~~~~" for n in range(2, 9)], return_tensors="pt").input_ids
    assert "--without-switch" in here(capsys, "consolidate", run, tmp_path / "stock", code=2)
    here(capsys, "consolidate", run, tmp_path / "stock", "--without-switch")
    merged = load(tmp_path / "stock")
    for model in (grow.load(run), grow.load(run / "result")):
        model.requires_grad_(False)
        assert torch.equal(logits(model, input_ids=far), logits(base, input_ids=far))
        assert model.switched.tolist() == [False]
        found = logits(model, input_ids=prompt)
        assert model.switched.all() and torch.allclose(found, logits(merged, input_ids=prompt), atol=0.3)
        assert not torch.equal(found, logits(base, input_ids=prompt))
        both = torch.cat((prompt[:3], tokens(prompt.shape[1]).repeat(3, 1)))
        mixed = logits(model, input_ids=both)
        assert model.switched.tolist() == [True] * 3 + [False] * 3
        assert torch.equal(mixed[3:], logits(base, input_ids=both)[3:])
    script("launch/consolidate.sh", recipe, LIMIT="4")
    assert json.loads((tmp_path / "run-scores.json").read_text())["task"]["opened"] == 1
    said = here(capsys, "eval", run / "result", "--recipe", recipe, "--limit", "5")
    assert "switch open for 100.0%" in said
