"""KL regularisation towards the frozen base: a model learns, stays nearer to it, and resumes in the same bits."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from grow.checkpoint.expand import expand
from grow.data.general_text import general_text
from grow.data.labels import IGNORED
from grow.data.packing import collate
from grow.errors import UserError
from grow.methods import METHODS, read_recipe
from grow.model.loading import load
from grow.model.loss import base_logits, labelled_logits, likelihood_and_kl
from grow.training.check import check_run
from tests.helpers.running import consolidate, train, train_and_resume
from tests.helpers.tiny import ROOT, make_recipe

pytestmark = pytest.mark.gpu

ZERO_3 = str(ROOT / "grow/training/deepspeed/zero3.json")


def distance(checkpoint: Path, base: Path, text: Path) -> float:
    """KL from the base, nats, the mean over all tokens of the text."""
    model, before = load(checkpoint, torch.float32), load(base, torch.float32)
    (sequences,) = general_text([str(text)], 32, AutoTokenizer.from_pretrained(checkpoint), 0).folders
    found = []
    for sequence in sequences:  # type: ignore[attr-defined]
        batch = collate([sequence])
        with torch.no_grad():
            now, labels = labelled_logits(model, batch)
            then, _ = labelled_logits(before, batch)
        assert len(labels) == (batch["labels"] != IGNORED).sum()
        found += likelihood_and_kl(now, then, labels)[1].tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("method", "stage", "ranks"),
    [
        ("g_freeze", 2, 1),
        pytest.param("g_train", 3, 2, marks=pytest.mark.full),
        pytest.param("sft", 2, 1, marks=pytest.mark.full),
        pytest.param("lora", 3, 2, marks=pytest.mark.full),
        pytest.param("adapter", 2, 1, marks=pytest.mark.full),
    ],
)
def test_near_the_base(
    method: str, stage: int, ranks: int, text_base: Path, sums: Path, text: Path, tmp_path: Path
) -> None:
    grown, distances = tmp_path / "grown", []
    expand(str(text_base), str(grown), layers="1,2")
    assert distance(grown, text_base, text) == 0, "growth starts as its base"
    for weight in (0.0, 20.0):
        run = tmp_path / f"run-{weight}"
        fields = {"method": method, "dtype": "float32", "output_dir": str(run), "learning_rate": 2e-2}
        held = {"kl_weight": weight, "kl_text": str(text)} if weight else {}
        recipe = make_recipe(tmp_path / f"{weight}.yaml", text_base, grown, sums, stage, **fields, **held)
        if weight:
            train_and_resume(recipe, ranks)
        else:
            train(recipe, ranks)
        trained = run / "result"
        if method != "adapter":  # which load() takes as it is
            trained = tmp_path / f"trained-{weight}"
            consolidate(str(run), str(trained), "grown" if METHODS[method].grows else "stock")
        distances.append(distance(trained, text_base, text))
    # In four steps, of which the first knows no distance yet.
    assert 0 < distances[1] < distances[0] * 0.7


def test_near_the_base_on_its_own_text(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """Nothing from outside: the base writes what the model is held near on, once, and a run that resumes has it."""
    grown, distances = tmp_path / "grown", []
    expand(str(text_base), str(grown), layers="1,2")
    for weight in (20.0, 0.0):
        run = tmp_path / f"run-{weight}"
        fields = {"dtype": "float32", "output_dir": str(run), "learning_rate": 2e-2}
        held = {"kl_weight": weight, "kl_text": "self", "self_tokens": 512} if weight else {}
        recipe = make_recipe(tmp_path / f"{weight}.yaml", text_base, grown, sums, 2, **fields, **held)
        if weight:
            run.mkdir()
            (run / "made.json").write_text('{"made": [[257, 9, 3]]}')  # of an attempt that never began
            train_and_resume(recipe, 1)
            written = json.loads((run / "made.json").read_text())["made"]
        else:
            train(recipe, 1)
            assert not (run / "made.json").exists()
        consolidate(str(run), str(tmp_path / f"trained-{weight}"), "grown")
        model = load(tmp_path / f"trained-{weight}", torch.float32)
        general = general_text(["self"], 32, AutoTokenizer.from_pretrained(text_base), 0, written)
        batch = collate([general[i] for i in range(8)])
        with torch.no_grad():
            now, labels = labelled_logits(model, batch)
            distances.append(float(likelihood_and_kl(now, base_logits(model, batch), labels)[1].mean()))
    assert sum(map(len, written)) > 300 and all(len(passage) <= 32 for passage in written)
    assert len({json.loads((tmp_path / "run-20.0" / "run.json").read_text())["made_checksum"], None}) == 2
    assert 0 < distances[0] < distances[1] * 0.7


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.keeps_base])
def test_the_base_is_inside(method: str, text_base: Path, text: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,2")
    model = load(tmp_path / "grown" if METHODS[method].grows else text_base, torch.bfloat16)
    METHODS[method]().prepare(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    general = general_text([str(text)], 32, AutoTokenizer.from_pretrained(text_base), 0)
    batch = collate([general[i] for i in range(8)])
    with torch.no_grad():
        moved, expected = (labelled_logits(one, batch)[0] for one in (model, load(text_base, torch.bfloat16)))
        assert torch.equal(base_logits(model, batch), expected) and not torch.equal(moved, expected)
        assert torch.equal(labelled_logits(model, batch)[0], moved), "α is what it was"


def test_folders_of_general_text_take_turns(text_base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "7 and 8."}\n')
    folders = [str(text), str(tmp_path)]
    general = general_text(folders, 32, AutoTokenizer.from_pretrained(text_base), 0)
    sizes = list(map(len, general.folders))
    assert sizes[0] > sizes[1] == 1, "of very different sizes"

    def seen(start: int, end: int) -> list[tuple[int, ...]]:
        return [tuple(general[i]["input_ids"].tolist()) for i in range(start, end)]

    for turn, sequences in enumerate(general.folders):
        own = sorted(tuple(sequence["input_ids"].tolist()) for sequence in sequences)  # type: ignore[attr-defined]
        size = len(own)
        for epoch in range(2):
            start = epoch * size * 2
            assert sorted(seen(start, start + 2 * size)[turn::2]) == own, "each once, then again"
    assert seen(0, 2 * sizes[0])[::2] != seen(2 * sizes[0], 4 * sizes[0])[::2], "in another order"


def test_weight_and_text_go_together(text_base: Path, sums: Path, text: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    expand(str(text_base), str(grown), layers="1")
    recipe = str(make_recipe(tmp_path / "r.yaml", text_base, grown, sums, 2))
    for fields, message in (
        ({"kl_weight": 1.0}, "go together"),
        ({"kl_text": str(text)}, "go together"),
        ({"kl_weight": 1.0, "kl_text": "self", "self_tokens": 0}, "self_tokens"),
        ({"kl_weight": -1.0, "kl_text": str(text)}, "above 0"),
        ({"kl_weight": 1.0, "kl_text": str(tmp_path / "none")}, "no such folder"),
        ({"kl_weight": 1.0, "kl_text": str(sums)}, "text"),
        ({"kl_weight": 1.0, "kl_text": str(text), "method": "sft", "deepspeed": ZERO_3}, "second model"),
    ):
        with pytest.raises(UserError, match=message):
            check_run(read_recipe(recipe, fields))


def test_text_of_its_own_is_cut_to_a_sequence(text_base: Path) -> None:
    """Where the base ends its text at once, there is nothing to be compared on."""
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    found = general_text(["self"], 8, tokenizer, 0, [[1] * 20, [2]])
    assert found[0]["input_ids"].tolist() == [1] * 7 + [256] and len(found.folders[0]) == 1
    with pytest.raises(UserError, match="writes nothing"):
        general_text(["self"], 8, tokenizer, 0, [[2]])
