"""Scores: against what they are by hand, at any α, with contaminated rows left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from grow.analysis.report import report
from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.switch_record import SwitchRecord
from grow.data.decontamination import contaminated
from grow.data.template import Template
from grow.errors import UserError
from grow.evaluation.answers import Answers, after
from grow.evaluation.evaluate import evaluate
from grow.evaluation.generation import translation_scores
from grow.methods import read_recipe
from grow.model.loading import compute_dtype, load
from tests.evaluation.test_find_alpha import shaken
from tests.helpers.running import alone, here, rows_of, train
from tests.helpers.tiny import folder_checksums, make_data, make_recipe
from tests.helpers.tiny import run as script


@pytest.fixture(scope="module")
def trained(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "grown"
    expand(str(text_base), str(path))
    return shaken(path, 0.02)


@pytest.fixture(scope="module")
def recipe(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two more retention sets, one with a text a row."""
    folder = tmp_path_factory.mktemp("recipe")
    data = make_data(folder / "data")
    rows = {
        "facts": [{"prompt": f"{n} is", "completion": " odd" if n % 2 else " even"} for n in range(30)],
        "prose": [{"text": f"Once upon a time there were {n} hens."} for n in range(20)],
    }
    for name, part in rows.items():
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return make_recipe(
        folder / "recipe.yaml", text_base, folder / "grown", data, 2, retention=str(data), max_length=64,
        retention_prompt="{question}", retention_completion="{answer}", test_split="test",
        retention_sets=[f"{folder}/facts", f"{folder}/prose"],
    )  # fmt: skip


def test_the_figures_are_those_of_each_row_alone(trained: Path, recipe: Path) -> None:
    settings = read_recipe(str(recipe))
    found = evaluate(str(trained), settings, limit=12)["task"]
    model = load(trained, compute_dtype())
    losses = [alone(model, example) for example in rows_of(trained, Path(settings.data), "test")[:12]]
    assert found["rows"] == len(found["items"]) == 12
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=0.02)
    assert found["items"] == pytest.approx([-loss.sum().item() for loss in losses], abs=0.1)
    assert found["log_likelihood"] == pytest.approx(sum(found["items"]) / 12, abs=1e-3)
    for key in ("loss", "token_accuracy", "exact_match", "log_likelihood"):
        low, high = found["intervals"][key]
        assert low <= found[key] <= high and (low < high or found[key] in (0, 1))


def test_over_the_dial_and_against_the_base(
    text_base: Path, trained: Path, recipe: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "scores.json"
    said = here(capsys, "eval", trained, "--recipe", recipe, "--alpha", "1,0,0.5", "--limit", "5", "--out", out)
    found = json.loads(out.read_text())
    assert [point["alpha"] for point in found["by_alpha"]] == [0, 0.5, 1] and found["alpha"] == 1
    assert said.count("α = ") == 3 and said.count("from the base") == 9
    # α = 0 is the base; the ends are what each scores by itself; each row is compared with itself.
    settings = read_recipe(str(recipe))
    base = evaluate(str(text_base), settings, limit=5)
    for part in ("task", "retention"):
        assert found["by_alpha"][0][part]["items"] == base[part]["items"]
    assert found["by_alpha"][0]["retention_sets"]["prose"]["from_base"]["interval"] == [0, 0]
    ends = json.loads(json.dumps(evaluate(str(trained), settings, limit=5, against=base)))
    for name in ("facts", "prose"):
        own = ends["retention_sets"][name]
        assert own == found["retention_sets"][name]
        means = own["log_likelihood"] - base["retention_sets"][name]["log_likelihood"]
        assert own["from_base"]["log_likelihood"] == pytest.approx(means, abs=1e-3)
    assert report((str(out),), str(tmp_path / "report"))["text"].count("α = ") == 3
    for point in found["by_alpha"]:
        point.pop("samples")  # as where generation failed
    out.write_text(json.dumps(found | {"name": "trained"}))
    assert report((str(out),), str(tmp_path / "report"))["text"].count("α = ") == 3
    # The same of a stock model and its base, whose weights are interpolated.
    consolidate(str(trained), str(tmp_path / "half"), alpha=0.5)
    wide = here(capsys, "eval", tmp_path / "half", "--start", text_base, "--alpha", "0,1", "--recipe", recipe, code=2)
    assert "of different shapes" in wide
    stock, inside = tmp_path / "whole", tmp_path / "inside.json"
    consolidate(str(trained), str(stock))
    here(capsys, "eval", trained, "--recipe", recipe, "--limit", "5", "--out", inside)
    here(capsys, "eval", stock, "--start", text_base, "--recipe", recipe, "--limit", "5", "--out", out)
    beside, inside_of = (json.loads(path.read_text())["retention_sets"]["prose"]["kl"] for path in (out, inside))
    assert 0 < beside == pytest.approx(inside_of, rel=0.05)
    assert "no base is inside" in here(capsys, "eval", text_base, "--alpha", "0.5", "--recipe", recipe, code=2)
    with pytest.raises(UserError, match="without α = 0"):
        evaluate(str(trained), settings, limit=5, against={"by_alpha": found["by_alpha"][1:]})
    fewer = ("--against", out, "--limit", "5", "--retention-limit", "3")
    assert "other rows" in here(capsys, "eval", trained, "--recipe", recipe, *fewer, code=2)


def test_how_far_it_is_from_the_base(trained: Path, text_base: Path, recipe: Path) -> None:
    """KL(base ‖ model) by hand, and exactly nothing where the model is the base."""
    settings = read_recipe(str(recipe))
    found = evaluate(str(trained), settings, (0.0, 1.0), limit=5, retention_limit=5)
    sets = [[p["task"], p["retention"], *p["retention_sets"].values()] for p in found["by_alpha"]]
    assert all((s["kl"], s["identical"], *s["intervals"]["kl"]) == (0, 1, 0, 0) for s in sets[0])
    assert all(s["kl"] > 0 and s["identical"] == 0 for s in sets[1])
    model, base = (load(path, compute_dtype()) for path in (trained, text_base))
    divergences = []
    for example in rows_of(trained, Path(settings.data), "test")[:5]:
        ids, mask = torch.tensor([example.input_ids]), torch.tensor(example.labels) >= 0
        now, before = (m(ids, use_cache=False).logits[0].float().log_softmax(-1)[mask] for m in (model, base))
        divergences.append((before.exp() * (before - now)).sum(-1))
    assert found["task"]["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=0.05)
    assert "kl" not in evaluate(str(text_base), settings, limit=5)["task"], (
        "the base of a stock checkpoint is not known"
    )
    again = evaluate(str(text_base), settings, limit=5, start=str(text_base))["task"]
    assert (again["kl"], again["identical"]) == (0, 1)


def test_with_a_switch(trained: Path, recipe: Path, tmp_path: Path, capsys: Any) -> None:
    """Rows that are off are the base's, in every figure; what is written after a prompt too."""
    switched = tmp_path / "switched"
    shutil.copytree(trained, switched)
    config = json.loads((switched / "config.json").read_text())
    weight = torch.zeros(32)
    config["growth"]["switch"] = SwitchRecord("row", 0, weight.numpy(), 1.0, facts={}).values()
    (switched / "config.json").write_text(json.dumps(config))
    settings = read_recipe(str(recipe))
    shut = evaluate(str(switched), settings, limit=5, retention_limit=5, samples=2)
    base = evaluate(str(trained), settings, (0.0,), limit=5, retention_limit=5, samples=2)
    assert shut["samples"] == base["samples"]
    for name in ("task", "retention"):
        assert (shut[name]["kl"], shut[name]["identical"], shut[name]["opened"]) == (0, 1, 0)
        assert shut[name]["items"] == base[name]["items"]
    config["growth"]["switch"] = SwitchRecord("row", 0, weight.numpy(), -1.0, facts={}).values()
    (switched / "config.json").write_text(json.dumps(config))
    said = here(capsys, "eval", switched, "--recipe", recipe, "--limit", "5", "--retention-limit", "5")
    assert "switch open for 100.0%" in said and "identical to the base on 0 of " in said


def test_what_training_rows_give_away_is_left_out(trained: Path, recipe: Path, tmp_path: Path) -> None:
    long = "the quick brown fox jumps over the lazy dog and then it sleeps for a week in its den"
    shared = "jumps over the lazy dog and then it sleeps for a week in"  # thirteen words
    training = [{"q": long, "a": "x"}, {"q": "short", "a": "row"}]
    held_out = [
        {"q": f"Yes: {shared}!", "a": "other"}, {"q": f"It {shared.replace('dog', 'cat')}.", "a": "y"},
        {"q": "Short.", "a": "row"}, {"q": "short", "a": "other"}, {"q": shared.rpartition(" ")[0], "a": "in"},
    ]  # fmt: skip
    template = Template("Q: {q}\nA:", " {a}")
    assert contaminated([(held_out, template), (held_out[3:], template)], (training, template)) == [{0, 2}, set()]
    # What is of many training rows, an instruction or a system turn, is of none; but a whole row is.
    many = [{"q": f"{long} {n}", "a": str(n)} for n in range(11)]
    assert contaminated([(held_out, template)], (many, template)) == [set()]
    assert contaminated([(held_out, template)], (many[:10], template)) == [{0}]
    assert contaminated([(many[3:4], template)], (many, template)) == [{0}]
    # Signs tell rows apart; letters' case and spaces do not.
    signs = [
        {"q": f"{sign}{n} {than} 7 ?", "a": "yes"} for n, sign, than in ((1, "", "<"), (1, "-", ">"), (1, "", " >"))
    ]
    assert contaminated([(signs, template)], ([{"q": "1 > 7 ?", "a": "Yes"}], template)) == [{2}]
    # In an evaluation: five of the training rows among the test rows.
    settings = read_recipe(str(recipe))
    data = make_data(tmp_path / "data")
    taken = (data / "train.jsonl").read_text().splitlines(keepends=True)[:5]
    with (data / "test.jsonl").open("a") as file:
        file.writelines(taken)
    clean = evaluate(str(trained), settings)["task"]
    found = evaluate(str(trained), read_recipe(str(recipe), {"data": str(data)}))["task"]
    assert (clean["contaminated"], found["contaminated"]) == (0, 5)
    assert found["items"] == clean["items"]


def last_logits(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1]


def test_accuracy_among_the_options(trained: Path, recipe: Path, tmp_path: Path, capsys: Any) -> None:
    """Three of four rows have the digit that the model likes best for their answer, the fourth that it likes least."""
    tokenizer, model = AutoTokenizer.from_pretrained(trained), load(trained, compute_dtype())
    rows = []
    for index in range(20):
        logits = last_logits(model, tokenizer, f"<bos>No. {index * index}:")
        liked = sorted("123456789", key=lambda digit: logits[tokenizer.convert_tokens_to_ids(digit)])
        rows.append({"question": f"No. {index * index}:", "answer": liked[-1] if index % 4 else liked[0]})
    data = make_data(tmp_path / "data")
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"data": str(data), "metric": "accuracy", "options": "1,2,3,4,5,6,7,8,9"}
    found = evaluate(str(trained), read_recipe(str(recipe), asked))["task"]
    # A tie within bf16's rounding may fall differently in a packed row.
    assert found["accuracy"] == pytest.approx(0.75, abs=0.06) and found["accuracy_rows"] == 20
    assert 0.4 < found["intervals"]["accuracy"][0] < found["accuracy"] < found["intervals"]["accuracy"][1]
    options = ("--metric", "accuracy", "--options", "1,2")
    assert "is not among" in here(capsys, "eval", trained, "--recipe", recipe, *options, code=2)


def test_translations_are_written_and_scored(trained: Path, recipe: Path) -> None:
    french = ["Le chat est sur la table.", "Il fait beau aujourd'hui.", "Je ne sais pas."]
    same = translation_scores(french, french)
    assert (same["chrf"], same["bleu"]) == (pytest.approx(100), pytest.approx(100))
    assert "nrefs:1" in same["bleu_signature"]
    other = translation_scores(["Le chien est sur la chaise.", "Il fait froid.", "Je sais."], french)
    assert 10 < other["chrf"] < 90 and other["intervals"]["chrf"][0] < other["chrf"] < other["intervals"]["chrf"][1]
    # Where little is shared, the interval ends at 0; and what is not written shares nothing.
    little = translation_scores(["", "a", "0", " ", "Le"], ["Le chat", "Il fait", "Je ne", "Oui", "Le chat"])
    assert 0 == little["intervals"]["chrf"][0] < little["chrf"] < little["intervals"]["chrf"][1] < 30
    assert translation_scores([""] * 3, ["un – deux"] * 3)["chrf"] == 0
    settings = read_recipe(str(recipe), {"metric": "chrf"})
    found = json.loads(json.dumps(evaluate(str(trained), settings, limit=20, samples=2)))
    assert 0 <= found["task"]["chrf"] <= 100 and len(found["samples"]) == 2


@pytest.mark.parametrize("shots", [0, 2])
def test_answers_are_written_and_scored(
    shots: int, trained: Path, recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily, a few tokens, to questions and not to running text; with others and their answers before, or none."""
    monkeypatch.setattr("grow.evaluation.interpolation.compute_dtype", lambda: torch.float32)  # which has no ties
    words = ["eval", trained, "--recipe", recipe, "--limit", 5, "--generate", 4, "--shots", shots]
    out = tmp_path / "scores.json"
    said = here(capsys, *words, "--retention-limit", 12, "--switch", "auto", "--out", out)
    found = json.loads(out.read_text())
    written = found["retention_sets"]["facts"]["generation"]
    assert "generation" in found["retention"] and "generation" not in found["retention_sets"]["prose"]
    assert written["rows"] == len(written["outputs"]) == 12 - shots and written["tokens"] == 4
    assert f"written{' after 2 others' if shots else ''}: exact {written['exact_match']:.1%}" in said
    model, tokenizer = load(trained, torch.float32), AutoTokenizer.from_pretrained(trained)
    before = "10 is even\n11 is odd\n" if shots else ""
    right = 0
    for number, output in enumerate(written["outputs"]):
        own = tokenizer(f"{before}{number} is", add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.bos_token_id, *own]])
        start, ends = ids.shape[1], [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False).input_ids]
        while ids.shape[1] < start + 4 and ids[0, -1] not in ends:
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert output == expected.strip().split("\n")[0]
        right += output.casefold().rstrip(".,;:!?") == ("odd" if number % 2 else "even")
    assert written["exact_match"] == right / written["rows"]


@pytest.mark.parametrize(
    ("output", "exact", "begins"),
    [
        ("Paris", 1, 1), (" paris.", 1, 1), ("Paris, in France", 0, 1), ("Parisian", 0, 0), ("la ville", 0, 0),
        ("", 0, 0),
    ],
)  # fmt: skip
def test_an_answer_may_go_on(output: str, exact: float, begins: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grow.evaluation.answers.generate", lambda *_: [{"output": output, "reference": "Paris"}])
    rows = Dataset.from_list([{"prompt": "{a}", "completion": "b"}])
    found = Answers().score(None, None, Template("{prompt}", "{completion}"), rows)
    assert (found["exact_match"], found["begins"]) == (exact, begins)


def test_shots_are_other_rows(trained: Path, recipe: Path, capsys: Any) -> None:
    shown = after([{"prompt": "{a} is", "completion": " {b}"}], Template("{prompt}", "{completion}"))
    assert shown.text({"prompt": "2 is", "completion": " even"}, None).text == "{a} is {b}\n2 is even"
    words = ["eval", trained, "--recipe", recipe, "--retention-limit", 3, "--limit", 3]
    assert "goes with --generate" in here(capsys, *words, "--shots", 1, code=2)
    assert "give fewer shots" in here(capsys, *words, "--generate", 4, "--shots", 3, code=2)


TASK: dict[str, Any] = {
    "task": "local_sums", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "target_delimiter": "",
    "doc_to_text": "{{question}}", "doc_to_choice": ["1", "2", "3"], "doc_to_target": "{{answer[0]|int % 3}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.mark.parametrize("which", ["trained", "text_base"])
def test_lm_eval_with_a_local_task(
    which: str, recipe: Path, request: pytest.FixtureRequest, tmp_path: Path, capsys: Any
) -> None:
    path = request.getfixturevalue(which)
    data = Path(read_recipe(str(recipe)).data) / "test.jsonl"
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(json.dumps(task))
    group = {"group": "sums", "task": ["local_sums"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "group.yaml").write_text(json.dumps(group))
    options = ("--lm-eval", "sums", "--include-path", tmp_path / "tasks")
    found = json.loads(here(capsys, "eval", path, *options, "--json").splitlines()[-1])["lm_eval"]
    (accuracy,), (of_group,) = found["local_sums"].values(), found["sums"].values()
    assert (of_group["value"], of_group["rows"]) == (pytest.approx(accuracy["value"]), accuracy["rows"])
    model, tokenizer, right = load(path, compute_dtype()), AutoTokenizer.from_pretrained(path), 0
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        logits = last_logits(model, tokenizer, row["question"])
        tokens = tokenizer.convert_tokens_to_ids(["1", "2", "3"])
        right += int(logits[tokens].argmax()) == int(row["answer"][0]) % 3
    # A tie within bf16's rounding may fall differently in a batch.
    assert accuracy["rows"] == len(rows) and accuracy["value"] == pytest.approx(right / len(rows), abs=0.05)
    assert accuracy["interval"][0] <= accuracy["value"] <= accuracy["interval"][1]


@pytest.mark.full
def test_a_task_that_is_not_known(text_base: Path, capsys: Any) -> None:
    assert "is not a task" in here(capsys, "eval", text_base, "--lm-eval", "nonsense_task", code=2)


def test_fields_of_a_run_go_along(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """What launch/consolidate.sh scores is of the rows that the run was given, and not of the recipe's file."""
    other = tmp_path / "other"
    shutil.copytree(sums, other)
    lines = (sums / "test.jsonl").read_text().splitlines(keepends=True)
    (other / "test.jsonl").write_text("".join(lines[:3]))
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, other, 2, method="sft")
    train(recipe, 1)
    make_recipe(recipe, text_base, tmp_path, sums, 2, method="sft")
    script("launch/consolidate.sh", recipe, "--data", other)
    scores = json.loads((tmp_path / "run-scores.json").read_text())["task"]
    assert scores["rows"] + scores["contaminated"] == 3 < len(lines)
    # A part that fails is tried again.
    (tmp_path / "run-scores.json").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sacrebleu.py").write_text("raise ValueError('no scores today')")
    words = ("launch/consolidate.sh", recipe, "--metric", "chrf")
    failed = script(*words, code=1, PYTHONPATH=str(tmp_path / "broken"))
    assert "no scores today (all else is scored, and in" in failed.stderr
    script(*words)
    assert "chrf" in json.loads((tmp_path / "run-scores.json").read_text())["task"]
    # Another α has results of its own, and what is there is kept aloud.
    half = script("launch/consolidate.sh", recipe, "--data", other, ALPHA="0.50")
    assert "is kept" not in half.stderr and (tmp_path / "run-scores-alpha0.5.json").is_file()
    assert folder_checksums(tmp_path / "run-stock") != folder_checksums(tmp_path / "run-stock-alpha0.5")
    again = script("launch/consolidate.sh", recipe, "--data", other, ALPHA="0.5")
    assert again.stderr.count("is kept") == 2


def test_numbers_that_are_none(text_base: Path, recipe: Path, capsys: pytest.CaptureFixture) -> None:
    for flag, value in (("--limit", "-1"), ("--retention-limit", "-3"), ("--samples", "nan"), ("--alpha", "inf")):
        assert f"{flag} {value}: " in here(capsys, "eval", text_base, "--recipe", recipe, flag, value, code=2)
    assert "--temperature nan: a number" in here(
        capsys, "chat", text_base, "--prompt", "x", "--temperature", "nan", code=2
    )
