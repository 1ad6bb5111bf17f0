"""compile: each layer is one graph, all layers of a kind are compiled once, and a run learns and resumes as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from grow.checkpoint.expand import expand
from grow.errors import UserError
from grow.methods import METHODS, read_recipe
from grow.model.layouts import decoder_layers
from grow.model.loading import load
from grow.training.check import check_run
from grow.training.compiling import check_compiler, compiles
from tests.checkpoint.test_architectures import make
from tests.helpers.running import train, train_and_resume
from tests.helpers.tiny import make_recipe, tokens


@pytest.mark.parametrize("method", ["sft", "g_freeze", "g_train", "lora", "g_lora"])
@pytest.mark.parametrize(
    "kind", ["", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("llama", "phi3", "gpt2"))]
)
def test_a_layer_is_one_graph(text_base: Path, tmp_path: Path, method: str, kind: str) -> None:
    """Compiled whole, or torch raises; twice, since the lowest layer's input has no gradient."""
    if kind == "gpt2" and "lora" in method:
        return
    base = make(tmp_path / "base", kind) if kind else text_base
    if METHODS[method].grows:
        expand(str(base), str(tmp_path / "grown"))
        base = tmp_path / "grown"
    torch._dynamo.reset()
    counters.clear()
    model: Any = load(base, torch.float32)  # in eval mode: GPT-2 has dropout
    METHODS[method]().prepare(model)
    inputs = {"input_ids": tokens(16), "position_ids": torch.arange(16)[None], "use_cache": False}
    found = []
    for compiled in (False, True):
        model.zero_grad()
        for layer in decoder_layers(model) if compiled else ():
            layer.compile(fullgraph=True, backend="aot_eager")
        logits = model(**inputs).logits
        logits.square().mean().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert counters["stats"]["unique_graphs"] <= 2 < len(decoder_layers(model))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1])


def test_where_it_cannot_be(text_base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(stage: int, **fields: Any) -> Any:
        return read_recipe(str(make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "g", sums, stage, **fields)))

    with pytest.raises(UserError, match="not under ZeRO-3"):
        check_run(recipe(3, method="sft", compile=True))
    with pytest.raises(UserError, match="not with a switch"):
        check_run(recipe(1, method="lora", compile=True, switch="row"))
    with pytest.raises(UserError, match="blocks changes each layer in its own way"):
        check_run(recipe(1, method="blocks", compile=True))
    with pytest.raises(UserError, match="there are auto, true, false"):
        recipe(1, compile="some")
    assert compiles(recipe(1, compile=True)) and not compiles(recipe(1, compile=False))
    assert compiles(recipe(1)) == torch.cuda.is_available() and not compiles(recipe(3))
    assert not compiles(recipe(1, method="lora", switch="row"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"compile true: a compiler .* is not installed"):
        check_compiler(recipe(1, method="sft", compile=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not compiles(recipe(1))


@pytest.mark.full
@pytest.mark.gpu
def test_a_compiled_run_learns_and_resumes(text_base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"))
    fields = {"method": "g_freeze", "compile": True}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, **fields)
    assert train_and_resume(recipe, 1)


@pytest.mark.full
@pytest.mark.gpu
def test_it_starts_near_the_base(text_base: Path, tmp_path: Path) -> None:
    """Compiled, base and grown model are near each other; the promise of equal bits is of those that are not."""
    expand(str(text_base), str(tmp_path / "grown"))
    models = [load(path, torch.float32) for path in (text_base, tmp_path / "grown")]
    for model in models:
        for layer in decoder_layers(model):
            layer.compile()
    with torch.no_grad():
        before, after = (model(tokens(), use_cache=False).logits for model in models)
    assert (before - after).abs().max() < 1e-4


def test_a_first_line_says_it(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, method="sft", max_steps=1)
    assert "compiled" not in train(recipe, 1)
