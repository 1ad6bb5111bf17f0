"""The interpolation coefficient: how far a model is from its base, the largest α within a bound; with intervals."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.evaluation.bootstrap import interval
from grow.evaluation.find_alpha import find_alpha, largest_alpha
from grow.evaluation.interpolation import Interpolation
from grow.model.loading import compute_dtype, load
from grow.model.loss import likelihood_and_kl
from tests.helpers.running import here

TEXT = "\n\n".join(f"The {n} hens of farmer {name} lay {n * n} eggs." for n, name in enumerate("ABCDEFGHIJ", 3))


def shaken(path: Path, by: float) -> Path:
    """Moves what a checkpoint has (of a grown one, the growth) by noise, as if it had been trained."""
    torch.manual_seed(0)
    for file in path.glob("growth-*.safetensors" if list(path.glob("growth-*")) else "*.safetensors"):
        tensors = {name: t + by * torch.randn(t.shape).to(t) for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def trained(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grown model that has moved, in layers 1 and 2."""
    path = tmp_path_factory.mktemp("trained") / "grown"
    expand(str(text_base), str(path), layers="1-2")
    return shaken(path, 0.05)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def divergence(one: Path, other: Path, **options: Any) -> float:
    """KL over all positions of the text, passage by passage, by all logits of both models."""
    models = [load(one, compute_dtype()), load(other, compute_dtype(), **options)]
    tokenizer = AutoTokenizer.from_pretrained(one)
    total = count = 0.0
    for passage in TEXT.split("\n\n"):
        ids = tokenizer("<bos>" + passage, return_tensors="pt").input_ids
        with torch.no_grad():
            before, now = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in models)
        total += torch.nn.functional.kl_div(now, before, reduction="sum", log_target=True).item()
        count += len(now)
    return total / count


def test_likelihood_and_divergence_position_by_position() -> None:
    logits, base = torch.randn(2, 600, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(600) % 11
    likelihood, apart = likelihood_and_kl(logits, base, labels)
    assert torch.allclose(-likelihood, torch.nn.functional.cross_entropy(logits, labels, reduction="none"), atol=1e-5)
    p, q = base.softmax(-1), logits.softmax(-1)
    assert torch.allclose(apart, (p * (p / q).log()).sum(-1), atol=1e-5) and (apart > 0).all()
    assert likelihood_and_kl(logits, base, labels[:0])[0].shape == (0,)


@pytest.mark.parametrize("curve", [lambda a: 3 * a**2, lambda a: a**0.5, lambda a: max(0, a - 0.8), math.expm1])
@pytest.mark.parametrize("bound", [0.001, 0.1, 0.3])
def test_the_largest_alpha_within_a_bound(curve: Any, bound: float) -> None:
    seen = largest_alpha(lambda a: {"alpha": a, "kl": float(curve(a)), "interval": (0, 0)}, bound)
    best = max(a for a in np.arange(0, 1.0001, 0.0005) if curve(a) <= bound)
    assert seen[-1]["kl"] <= bound and seen[-1]["alpha"] == pytest.approx(best, abs=0.02)
    assert len(seen) < 14


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        weights = generator.integers(1, 9, 60)
        low, high = interval(generator.normal(2.0, 3.0, 60) * weights, weights, draws=300)
        held += low < 2.0 < high
    assert 178 <= held <= 198, held
    assert interval([3.0]) == (3.0, 3.0)


def test_the_dial_is_found(text_base: Path, trained: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    whole = divergence(text_base, trained)
    bound = whole / 10
    said = json.loads(
        here(capsys, "find-alpha", trained, "--max-kl", f"{bound}", "--text", text, "--json").splitlines()[-1]
    )
    assert 0 < said["alpha"] < 1 and 0.9 * bound < said["kl"] <= bound and said["passages"] == 10
    assert said["interval"][0] < said["kl"] < said["interval"][1]
    assert (said["seen"][-1]["alpha"], said["seen"][-1]["kl"]) == (1, pytest.approx(whole, rel=0.05))
    assert divergence(text_base, trained, alpha=said["alpha"]) == pytest.approx(said["kl"], rel=0.05)
    # The line that it prints makes a stock checkpoint as far from the base.
    words = said["next"].replace("OUT", str(tmp_path / "out")).split()
    assert words[0] == "grow" and "--uniform" in words
    here(capsys, *words[1:])
    assert divergence(text_base, tmp_path / "out") == pytest.approx(said["kl"], rel=0.1)
    jsonl = tmp_path / "text.jsonl"
    jsonl.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in TEXT.split("\n\n")))
    assert find_alpha(str(trained), "", str(jsonl), 10, bound)["kl"] == said["kl"]
    assert find_alpha(str(trained), "", str(jsonl), 10, 1e9)["alpha"] == 1


def test_between_a_stock_model_and_its_base(
    text_base: Path, trained: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for file in text_base.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    model = Interpolation(shaken(tuned, 0.02), str(text_base))
    dtype = str(compute_dtype()).removeprefix("torch.")
    for alpha in (0.3, 0, 1):
        model.set(alpha)
        consolidate(str(tuned), str(tmp_path / f"{alpha}"), alpha=alpha, start=str(text_base), dtype=dtype)
        expected = load(tmp_path / f"{alpha}", compute_dtype()).parameters()
        assert all(torch.equal(*pair) for pair in zip(model.model.parameters(), expected, strict=True))
    found = find_alpha(str(tuned), str(text_base), str(text), 10, 0.02)
    assert 0 < found["alpha"] < 1 and f"--start {text_base}" in found["next"]
    assert "no base is inside" in here(capsys, "find-alpha", tuned, "--text", text, code=2)
    assert "has its base inside" in here(capsys, "find-alpha", trained, "--start", text_base, "--text", text, code=2)
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    assert "is no text" in here(capsys, "find-alpha", trained, "--text", tmp_path / "null.jsonl", code=2)
    assert "no passage" in here(capsys, "find-alpha", trained, "--text", "/dev/null", code=2)
