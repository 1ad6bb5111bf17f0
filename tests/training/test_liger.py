"""use_liger_kernel: with Liger's kernels a model computes what it computes without; and where they cannot be."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.errors import UserError
from grow.methods import read_recipe
from grow.model.layouts import decoder_mlps, stock_class
from grow.model.loading import load
from grow.training.check import check_run
from grow.training.liger import check_kernels, use_liger, uses_liger
from tests.checkpoint.test_architectures import make
from tests.helpers.tiny import ROOT, make_recipe, tokens


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the package, which notes what it is asked to put in; its MLP computes in the stock one's way."""

    class MLP:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            asked["calls"] = asked.get("calls", 0) + 1
            result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return result

    def to_gemma3_text(
        rope: bool = True, rms_norm: bool = True, geglu: bool = True, cross_entropy: bool = False
    ) -> None:
        raise AssertionError("only its signature is read")

    asked: dict[str, Any] = {}
    package, kernels, table = (ModuleType(f"liger_kernel{name}") for name in ("", ".transformers", ".transformers.x"))
    kernels.LigerGEGLUMLP = MLP  # type: ignore[attr-defined]
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"gemma3_text": to_gemma3_text}  # type: ignore[attr-defined]
    package.__spec__ = __spec__
    for name, module in (("", package), (".transformers", kernels), (".transformers.monkey_patch", table)):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    monkeypatch.setattr("grow.training.liger.apply_liger_kernel", lambda _, config: asked.update(config=config))
    return asked


def test_all_branches_use_the_kernels(
    text_base: Path, tmp_path: Path, liger: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expand(str(text_base), str(tmp_path / "grown"))
    models = [load(path, torch.float32) for path in (text_base, tmp_path / "grown")]
    cls = stock_class(next(iter(decoder_mlps(models[0]).values())))
    monkeypatch.setattr(cls, "forward", cls.forward)  # which puts it back
    before = models[0](tokens(), use_cache=False).logits
    calls = []
    for model in models:
        use_liger(model)
        liger["calls"] = 0
        assert torch.equal(model(tokens(), use_cache=False).logits, before)
        calls.append(liger["calls"])
    layers = len(decoder_mlps(models[0]))
    assert calls == [layers, 2 * layers]  # the base's branch and the copies'
    # The rest is Liger's own, but for MLPs, whose growth would be lost, and for the loss.
    assert liger["config"] == {
        "geglu": False, "swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": False,
    }  # fmt: skip


def test_where_they_cannot_be(
    text_base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, liger: dict[str, Any]
) -> None:
    def recipe(**fields: Any) -> Any:
        return read_recipe(str(make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "g", sums, 1, **fields)))

    with pytest.raises(UserError, match="use_liger_kernel some: there are auto, true, false"):
        recipe(use_liger_kernel="some")
    with pytest.raises(UserError, match="compile fuses the same operations"):
        check_run(recipe(method="sft", use_liger_kernel=True, compile=True))
    wanted = recipe(method="sft", use_liger_kernel=True)
    assert not uses_liger(recipe(), "gemma3_text") or torch.cuda.is_available()
    assert uses_liger(wanted, "gemma3_text")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="need a GPU"):
        check_kernels(wanted, "gemma3_text")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_kernels(wanted, "gemma3_text")
    with pytest.raises(UserError, match="Liger has no kernels for phi"):
        check_kernels(wanted, "phi")
    assert uses_liger(recipe(compile=False), "gemma3_text") and not uses_liger(recipe(compile=False), "phi")
    assert not uses_liger(recipe(compile=True), "gemma3_text")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        check_kernels(wanted, "gemma3_text")
    assert not uses_liger(recipe(compile=False), "gemma3_text")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["", "llama", "qwen3", "phi3"])
def test_it_computes_as_without(text_base: Path, tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """The real kernels, by Triton's interpreter: near in fp32; and a grown model starts on the bits of its base, both
    with the kernels."""
    folder = tmp_path_factory.mktemp("liger")
    base = make(folder / "base", kind) if kind else text_base
    expand(str(base), str(folder / "grown"))
    words = [sys.executable, "-m", "tests.helpers.with_liger", str(base), str(folder / "grown")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(_installed(tmp_path_factory))}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "as without", done.stderr[-3000:]


def _installed(factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages, which are no requirement; torch for processors comes without triton."""
    folder = factory.getbasetemp() / "liger-site"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, "liger-kernel==0.8.5", "triton==3.9.0"], check=True)
    return folder
