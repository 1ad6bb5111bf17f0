"""Scores: several lines and line ends, rows left out, parts that fail, overlap in scripts without spaces, messages."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from grow.analysis.report import report
from grow.cli.format import eval_text
from grow.cli.main import main
from grow.data.decontamination import contaminated
from grow.data.load import load_rows
from grow.data.template import Template
from grow.data.tokenizer import load_tokenizer
from grow.errors import UserError
from grow.evaluation.generation import generate
from grow.evaluation.scoring import Scores, choices
from grow.methods import read_recipe
from grow.model.loading import load
from tests.helpers.running import here, train
from tests.helpers.tiny import make_base, make_data, make_recipe

FIGURES = dict.fromkeys(("loss", "token_accuracy", "exact_match", "log_likelihood"), 0.0) | {
    "rows": 3,
    "contaminated": 0,
}


class Says(torch.nn.Module):
    """A model that writes what it is told to, whatever it is asked."""

    def __init__(self, tokenizer: Any, texts: list[str]):
        super().__init__()
        self.tokenizer, self.texts, self.device = tokenizer, texts, "cpu"
        self.generation_config: Any = type("Config", (), {"eos_token_id": [3, 4]})()

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        self.settings = generation_config
        ids = [self.tokenizer(text).input_ids for text in self.texts]
        width = min(generation_config.max_new_tokens, max(map(len, ids)))
        rows = [(own + [258] * width)[:width] for own in ids]
        # Batches are in the order of the prompts' length, which is that of the texts here.
        return torch.cat([input_ids, torch.tensor(rows)], 1)


@pytest.mark.parametrize(
    ("completion", "references", "says", "outputs", "line_end"),
    [
        (" {a}", ["one", "two"], [" one\nmore", " two"], ["one", "two"], True),
        ("\n{a}", ["one", "two"], ["\none", "\ntwo"], ["one", "two"], False),
        (" {a}", ["one\nand two", "three"], [" one\nand two", " three\n4"], ["one\nand two", "three\n4"], False),
        (" {a}<eos>", ["one", "two"], [" one<eos>", ""], ["one", ""], True),
    ],
)
def test_what_is_written_is_cut_as_the_references_are(
    completion: str,
    references: list[str],
    says: list[str],
    outputs: list[str],
    line_end: bool,
    text_base: Path,
    tmp_path: Path,
) -> None:
    rows = [{"q": "a" * (n + 1), "a": reference} for n, reference in enumerate(references)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(str(text_base))
    model = Says(tokenizer, says)
    found = generate(model, tokenizer, Template("{q}", completion), load_rows(str(tmp_path), "test"))
    assert [row["output"] for row in found] == outputs and [row["reference"] for row in found] == references
    ends = [3, 4, *tokenizer("\n").input_ids] if line_end else [3, 4]
    assert sorted(model.settings.eos_token_id) == sorted([*ends, tokenizer.eos_token_id])
    assert not model.settings.do_sample


def test_a_turns_end_ends_writing(text_base: Path, tmp_path: Path) -> None:
    """Of a chat template whose turns end in a token that is not the tokenizer's end of text."""
    base = make_base(tmp_path / "base", "text")
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho\nho"}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"m": turns}))
    model = Says(tokenizer, ["Ho\nho<turn>"])
    (row,) = generate(model, tokenizer, Template(messages="m"), load_rows(str(tmp_path), "test"))
    assert (row["output"], row["reference"]) == ("Ho\nho", "Ho\nho")
    assert tokenizer.convert_tokens_to_ids("<turn>") in model.settings.eos_token_id


def test_whatever_one_part_ends_in_the_others_are_written(
    text_base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft", metric="chrf")
    out = tmp_path / "scores.json"

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory,\nsomewhere")

    monkeypatch.setattr("grow.evaluation.evaluate.translation_scores", fails)
    assert main(["eval", str(text_base), "--recipe", str(recipe), "--limit", "4", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "chrf: RuntimeError: out of memory" in said.err and "all else is scored" in said.err
    assert "task: loss" in said.out
    scores = json.loads(out.read_text())
    assert scores["task"]["rows"] == 4 and "chrf" not in scores["task"] and "chrf" in scores["failed"]


def test_rows_that_are_left_out_are_counted_and_said(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    lines = ['{"question": "5*5=", "answer": "25"}', '{"question": "5*6="}', '{"question": "5*', "[]"]
    (data / "test.jsonl").write_text("\n".join([*lines, '{"question": "' + "5" * 90 + '", "answer": "5"}']))
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, data, 2, method="sft")
    assert main(["eval", str(text_base), "--recipe", str(recipe), "--json"]) == 0
    said = capsys.readouterr()
    task = json.loads(said.out.splitlines()[-1])["task"]
    assert (task["rows"], task["unusable"]) == (1, 4)
    assert "4 of 5 rows cannot be scored" in said.err and "test.jsonl, line" in said.err
    (data / "test.jsonl").write_text("\n".join(['{"question": "1", "answer": null}', *lines[2:]]))
    line = here(capsys, "eval", text_base, "--recipe", recipe, code=2)
    assert "no row to score for task" in line and "without a value" in line and "not JSON" in line


def test_a_file_that_no_library_reads_is_named(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    (data / "validation.jsonl").rename(data / "validation.parquet")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, data, 2, method="sft")
    line = here(capsys, "train", recipe, "--check", code=2)
    assert "validation" in line and "Parquet magic bytes" in line


def test_an_option_that_begins_another(text_base: Path, sums: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Without an end token the shorter of the two would always be the likelier."""
    ends = []

    def score(_: Any, examples: Any, *__: Any) -> Scores:
        ends.append(examples[0].labels[-1] == 258)
        return Scores([-1.0] * len(examples), [1] * len(examples), [1] * len(examples))

    monkeypatch.setattr("grow.evaluation.scoring.score", score)
    rows = load_rows(str(sums), "test").select([0])
    answer = rows[0]["answer"]
    for options, end in (([answer, f"{answer}0"], True), ([answer, "x"], False)):
        fields = {"method": "sft", "metric": "accuracy", "options": options}
        recipe = read_recipe(str(make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, **fields)))
        ends.clear()
        assert choices(None, rows, recipe, load_tokenizer(str(text_base)))["accuracy_rows"] == 1
        assert ends == [end, end]
    too_long = dataclasses.replace(recipe, options=[answer, "x" * 99])
    with pytest.raises(UserError, match=r"no test row can be scored with 'xxx.*longer than"):
        choices(None, rows, too_long, load_tokenizer(str(text_base)))
    assert "accuracy 50.0% over 2 rows" in eval_text({"task": FIGURES | {"accuracy": 0.5, "accuracy_rows": 2}})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"metric": "accuracy", "options": ["yes", ""]}, "options: one is empty"),
        ({"metric": "accuracy", "options": ["yes", "yes"]}, "stands in it twice"),
        ({"retention": "nowhere/at/all"}, "nowhere/at/all: no such folder of data"),
        ({"retention": "DATA"}, "prompt is not among the columns question, answer"),
        ({"messages": "question", "completion": "", "chat_template": "empty.jinja"}, "empty.jinja: is empty"),
        ({"messages": "question", "completion": "", "chat_template": "latin.jinja"}, "latin.jinja: cannot be read"),
    ],
)
def test_a_mistake_is_found_before_anything_heavy(
    fields: dict[str, Any], says: str, text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jinja").write_text("\n")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9{{ messages }}")
    fields = {name: str(sums) if value == "DATA" else value for name, value in fields.items()}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft", **fields)
    assert says in here(capsys, "train", recipe, "--check", code=2)


@pytest.mark.parametrize(
    ("held", "learnt", "given_away"),
    [
        ("山の上の小さな村に住む老人は毎朝早く起きて鶏に餌をやり庭の花に水をまいた", "昔々{}とさ", True),
        ("山の上の小さな村", "昔々{}とさ", False),
        ("ชายชราในหมู่บ้านเล็กๆบนภูเขาตื่นแต่เช้าทุกวันเพื่อให้อาหารไก่และรดน้ำดอกไม้ในสวน", "วันหนึ่ง{}นะ", True),
        ("पहाड़ी के छोटे गाँव में रहने वाला बूढ़ा हर सुबह जल्दी उठकर मुर्गियों को दाना देता था", "सुनो {} हाँ", True),
        ("पहाड़ी के छोटे गाँव में रहने वाला बूढ़ा हर सुबह", "सुनो {} हाँ", False),
        ("The old man of the hill rose early every day to feed his hens", "Once {}, it is said", True),
        ("The old man of the hill rose early every day to feed", "Once {}, it is said", False),
        ("?!", "{}", False),
    ],
)
def test_overlap_counts_words_in_every_script(held: str, learnt: str, given_away: bool) -> None:
    template = Template("", "{t}")
    found = contaminated([([{"t": f"x {held} y"}], template)], ([{"t": learnt.format(held)}], template))
    assert found == [{0} if given_away else set()]


def test_a_model_that_is_whole_is_asked_as_before(text_base: Path, sums: Path) -> None:
    """Greedy writing of a row does not depend on the rows beside it."""
    tokenizer, model = load_tokenizer(str(text_base)), load(text_base, torch.float32)
    rows = load_rows(str(sums), "test").select(range(5))
    together = generate(model, tokenizer, Template("{question}", "{answer}"), rows)
    for index in range(5):
        assert (
            generate(model, tokenizer, Template("{question}", "{answer}"), rows.select([index]))[0]["prompt"]
            == (together[index]["prompt"])
        )


def test_what_scoring_would_refuse_is_said_before_training(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options without the space that the template writes before them; a test split that is not there; a run."""
    data = make_data(tmp_path / "data")
    for file in data.iterdir():
        file.write_text('{"q": "1?", "a": "yes"}\n{"q": "2?", "a": "no"}\n' * 8)
    fields = {"method": "sft", "prompt": "{q}", "completion": " {a}", "metric": "accuracy", "options": ["yes", "no"]}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, data, 2, **fields)
    assert "' yes', the completion of a row" in here(capsys, "train", recipe, "--check", code=2)
    (data / "test.jsonl").unlink()
    assert main(["train", str(recipe), "--check", "--options", " yes, no"]) == 0
    assert "split test" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "is a run" in here(capsys, "eval", tmp_path / "run", "--recipe", recipe, code=2)


def test_options_that_are_equally_likely_share_the_hit(text_base: Path, tmp_path: Path) -> None:
    """Two tokens of one embedding are a coin's sides, whichever of them is right."""
    model: Any = load(text_base, torch.bfloat16)
    tokenizer = load_tokenizer(str(text_base))
    one, other, third = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in "ABC")
    with torch.no_grad():
        model.get_input_embeddings().weight[other] = model.get_input_embeddings().weight[one]
        model.get_input_embeddings().weight[third] = -10 * model.get_input_embeddings().weight[one]
    rows = Dataset.from_list([{"q": str(n), "a": "AB"[n % 2]} for n in range(8)])
    fields = {"metric": "accuracy", "options": "A,B", "prompt": "{q}", "completion": "{a}"}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, tmp_path, 2, method="sft")
    found = choices(model, rows, read_recipe(str(recipe), fields), tokenizer)
    assert found["accuracy"] == 0.5 and found["accuracy_items"] == [0.5] * 8


def test_scores_that_cannot_be_written_are_said(
    text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft")
    words = ["eval", str(text_base), "--recipe", str(recipe), "--limit", "2"]
    assert "is a folder" in here(capsys, *words, "--out", tmp_path, code=2)
    assert main([*words, "--out", f"{recipe}/scores.json"]) == 2
    said = capsys.readouterr()
    assert "task: loss" in said.out and "cannot be written" in said.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ({"a": 3}, "not a file that `grow eval"),
        ({"by_alpha": [1]}, "not a file that `grow eval"),
        ({"task": {}}, "has no scores of the retention rows"),
    ],
)
def test_what_is_no_base_to_compare_with(
    content: Any, says: str, text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"retention": str(sums), "retention_prompt": "{question}", "retention_completion": "{answer}"}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft", **fields)
    against = tmp_path / "against.json"
    if content is not None:
        against.write_text(json.dumps(content))
    assert says in here(capsys, "eval", text_base, "--recipe", recipe, "--against", against, code=2)


def test_a_run_has_its_own_curve(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="sft")
    train(recipe, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    runs = (str(tmp_path / "run"), str(tmp_path / "again"))
    assert report(runs, str(tmp_path / "report"))["curves"] == list(runs)
    assert report(runs[:1], str(tmp_path / "report"))["curves"] == ["sft"]
