"""Each method: exactly what it names trains, it learns, it resumes in the same bits, and it comes out again."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from grow.checkpoint.zero import ZeroCheckpoint
from grow.data.labels import IGNORED
from grow.errors import UserError
from grow.evaluation.evaluate import evaluate
from grow.evaluation.interpolation import Interpolation
from grow.methods import METHODS, read_recipe
from grow.methods.baselines.adapter import Adapter
from grow.methods.baselines.disel import Disel
from grow.model.alpha import base_inside
from grow.model.loading import load
from tests.helpers.running import (
    Deeper,
    Toy,
    alone,
    consolidate,
    curve,
    here,
    rows_of,
    start,
    train,
    train_and_resume,
)
from tests.helpers.tiny import logits, make_base, make_recipe

pytestmark = pytest.mark.gpu

TEXT_OR_ALL = pytest.mark.parametrize(
    ("kind", "stage", "ranks"), [("text", 1, 1), pytest.param("multimodal", 3, 2, marks=pytest.mark.full)]
)


def test_a_new_method_is_one_class_and_a_line(
    text_base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="toy", toy_layer=2)
    with pytest.raises(UserError, match="toy_layer is not a field"):
        read_recipe(str(recipe))
    train(recipe, 1)
    assert (tmp_path / "run" / "result" / "toy.txt").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["toy_layer"] == 2
    monkeypatch.setitem(METHODS, "toy", Toy)
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"))
    before, after = load_file(text_base / "model.safetensors"), load_file(tmp_path / "stock" / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.2.self_attn.q_proj.weight"]

    # And what it is told of the base's losses is so, row by row.
    examples = rows_of(text_base, sums, "train")
    losses = torch.load(tmp_path / "run" / "losses.pt", map_location="cpu")
    # 16 sequences of at most 32 tokens: no other row has been scored.
    seen = [row for row, found in enumerate(losses) if not found.isnan().all()]
    assert 16 <= len(seen) < len(examples) and sum(len(examples[row].labels) for row in seen) <= 16 * 32
    for example, found in [(examples[row], losses[row]) for row in seen[::5]]:
        expected = alone(load(text_base, torch.bfloat16), example)
        assert torch.equal(found.isnan(), torch.tensor(example.labels) == IGNORED)
        assert found[~found.isnan()].tolist() == pytest.approx(expected.tolist(), abs=0.15)


def test_a_method_may_change_the_shape_of_the_model(
    text_base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "deeper", Deeper)
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 2, method="deeper", dtype="float32")
    trained = train_and_resume(recipe, 1)
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"), dtype="float32")
    before, after = load(text_base, torch.float32), load(tmp_path / "stock")
    assert after.config.num_hidden_layers == 5 and len(after.model.layers) == 5
    assert not torch.equal(logits(before), logits(after))
    parameters = dict(after.named_parameters())
    assert all(torch.equal(parameters[name], trained[name]) for name in trained)
    del after.model.layers[4]
    assert torch.equal(logits(before), logits(after)), "all else is the base's"
    with pytest.raises(UserError, match="the base has no"):
        consolidate(str(tmp_path / "run"), str(tmp_path / "half"), alpha=0.5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_finch_goes_by_the_loss_of_the_whole_step(text_base: Path, sums: Path, ranks: int, tmp_path: Path) -> None:
    """Of all ranks' micro-batches: Adam's first step moves each weight by its rate, and so by 1/√loss of what it does
    in plain fine-tuning."""
    moved = {}
    before = load_file(text_base / "model.safetensors")
    for method in ("sft", "finch"):
        folder = tmp_path / method
        folder.mkdir()
        fields = {"method": method, "dtype": "float32", "weight_decay": 0.0, "max_steps": 1, "save_steps": 1}
        start(make_recipe(folder / "r.yaml", text_base, tmp_path, sums, 1, **fields), ranks)
        consolidate(str(folder / "run"), str(folder / "stock"), dtype="float32")
        after = load_file(folder / "stock" / "model.safetensors")
        moved[method] = torch.cat([(after[name] - before[name].float()).flatten() for name in before]).abs()
    (loss,) = [entry["loss"] for entry in curve(tmp_path / "finch" / "run" / "checkpoint-1") if "loss" in entry]
    sure = moved["sft"] > 0.99e-2  # where the gradient is far above Adam's ε
    assert sure.float().mean() > 0.5
    ratio = moved["finch"][sure] / moved["sft"][sure]
    assert torch.allclose(ratio, torch.tensor(loss**-0.5), rtol=1e-3)


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.full)])
def test_sft_of_some_mlps(sums: Path, stage: int, ranks: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "multimodal")
    fields = {"method": "sft", "dtype": "float32", "mlp_layers": "1,3"}
    recipe = make_recipe(tmp_path / "r.yaml", base, tmp_path, sums, stage, **fields)
    train_and_resume(recipe, ranks)
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"), dtype="float32")
    before, after = (dict(load(path, torch.float32).named_parameters()) for path in (base, tmp_path / "stock"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = itertools.product((1, 3), ("gate_proj", "up_proj", "down_proj"))
    assert changed == {f"model.language_model.layers.{layer}.mlp.{part}.weight" for layer, part in parts}
    for layers, message in (("1,4", "layer 4 does not exist"), ("x", "neither a layer")):
        with pytest.raises(UserError, match=message):
            METHODS["sft"](mlp_layers=layers).prepare(load(base))


@pytest.mark.parametrize("method", ["sft", "lora"])
def test_some_matrices(method: str, text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """gate and up alone, in all layers or in some; a name that no layer has is found before anything is loaded."""
    matrices, layers = {"sft": ("sft_matrices", "mlp_layers"), "lora": ("lora_targets", "lora_layers")}[method]
    fields = {"method": method, "dtype": "float32", matrices: ["gate_proj", "up_proj"]}
    for name, chosen, where in (("all", {}, range(4)), ("some", {layers: "1,3"}, (1, 3))):
        recipe = make_recipe(
            tmp_path / f"{name}.yaml", text_base, tmp_path, sums, 2, **fields, **chosen, output_dir=str(tmp_path / name)
        )
        train(recipe, 1)
        consolidate(str(tmp_path / name), str(tmp_path / f"{name}-stock"), dtype="float32")
        before, after = (
            dict(load(path, torch.float32).named_parameters()) for path in (text_base, tmp_path / f"{name}-stock")
        )
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        parts = itertools.product(where, ("gate_proj", "up_proj"))
        assert changed == {f"model.layers.{layer}.mlp.{part}.weight" for layer, part in parts}
    line = here(capsys, "train", recipe, "--check", f"--{matrices}=gate_prj", "--output_dir", tmp_path / "x", code=2)
    assert f"{matrices}: gate_prj is not a matrix of a decoder layer; did you mean gate_proj?" in line
    if method == "lora":  # of copies, attention has none
        words = ["--method", "g_lora", "--lora_targets", "q_proj", "--grown=", "--output_dir", tmp_path / "y"]
        assert "lora_targets: q_proj is not" in here(capsys, "train", recipe, "--check", *words, code=2)


@pytest.fixture(scope="module")
def plain(text_base: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What plain fine-tuning makes of the same, on one rank."""
    folder = tmp_path_factory.mktemp("plain")
    train(make_recipe(folder / "r.yaml", text_base, folder, sums, 2, method="sft", dtype="float32"), 1)
    return {name: value.load() for name, value in ZeroCheckpoint(folder / "run" / "checkpoint-4").trained.items()}


FIELDS: dict[str, dict[str, Any]] = {"sft": {}, "flow": {}, "stm": {"stm_threshold": 300}, "ewc": {"ewc_rows": 20}}


@pytest.mark.parametrize(
    ("method", "stage", "ranks"),
    [
        ("flow", 2, 1),
        ("stm", 2, 1),
        ("ewc", 2, 1),
        pytest.param("sft", 2, 1, marks=pytest.mark.full),
        pytest.param("flow", 3, 2, marks=pytest.mark.full),
        pytest.param("stm", 3, 2, marks=pytest.mark.full),
        pytest.param("ewc", 1, 2, marks=pytest.mark.full),
    ],
)
def test_kin_of_plain_fine_tuning(
    text_base: Path,
    sums: Path,
    plain: dict[str, torch.Tensor],
    method: str,
    stage: int,
    ranks: int,
    tmp_path: Path,
) -> None:
    fields = {"retention": str(sums), "retention_prompt": "{question}", "retention_completion": "{answer}"}
    recipe = make_recipe(
        tmp_path / "r.yaml",
        text_base,
        tmp_path,
        sums,
        stage,
        method=method,
        dtype="float32",
        **fields,
        **FIELDS[method],
    )
    trained = train_and_resume(recipe, ranks)
    assert not (tmp_path / "run" / "result").exists()
    before = load_file(text_base / "model.safetensors")
    assert {name: torch.equal(trained[name], before[name].float()) for name in before} == dict.fromkeys(before, False)
    consolidate(str(tmp_path / "run"), str(tmp_path / "stock"), dtype="float32")
    model = load(text_base, torch.float32)
    model.load_state_dict(trained, strict=False)
    assert (logits(load(tmp_path / "stock")) - logits(model)).abs().max() < 1e-4
    if method != "sft" and ranks == 1:
        assert any(not torch.equal(trained[name], plain[name]) for name in plain), "not plain by another name"


@pytest.mark.parametrize(
    ("method", "kind", "stage", "ranks", "dtype"),
    [
        ("lora", "text", 2, 1, "float32"),
        ("osf", "text", 2, 1, "float32"),
        pytest.param("osf", "multimodal", 1, 2, "float32", marks=pytest.mark.full),
        pytest.param("lora", "multimodal", 2, 2, "bfloat16", marks=pytest.mark.full),
        pytest.param("lora", "multimodal", 3, 2, "float32", marks=pytest.mark.full),
    ],
)
def test_peft(sums: Path, method: str, kind: str, stage: int, ranks: int, dtype: str, tmp_path: Path) -> None:
    tiny_base = make_base(tmp_path / "base", kind)
    fields = {"method": method, "dtype": dtype, "lora_rank": 4, "lora_alpha": 6}
    recipe = make_recipe(tmp_path / "r.yaml", tiny_base, tmp_path, sums, stage, **fields)
    trained = train_and_resume(recipe, ranks)
    base: Any = load(tiny_base, torch.float32)
    layers = {
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "vision" not in name
    }
    assert len(layers) == 4 * 7
    part = METHODS[method].part  # type: ignore[attr-defined]
    assert {name.partition(part)[0] for name in trained} == layers

    # What is merged offline is what PEFT makes of the folder, and what it computes without merging.
    expected_base = logits(base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "result")
    expected = logits(adapted)
    stock = {alpha: tmp_path / f"stock {alpha}" for alpha in (1, 0.5, 0)}
    for alpha, path in stock.items():
        consolidate(str(tmp_path / "run"), str(path), alpha=alpha, dtype="float32")
    assert (logits(load(stock[1])) - expected).abs().max() < 1e-4
    assert (expected_base - expected).abs().max() > 1e-2
    merged = adapted.merge_and_unload().state_dict()
    own = load(tiny_base, torch.float32).state_dict()
    half, none = load(stock[0.5]).state_dict(), load(stock[0]).state_dict()
    for name, tensor in load(stock[1]).state_dict().items():
        assert torch.equal(tensor, own[name]) != (name.removesuffix(".weight") in layers)
        assert torch.allclose(tensor, merged[name], atol=1e-5)
        assert torch.allclose(half[name], (own[name] + tensor) / 2, atol=1e-6)
        assert torch.equal(none[name], own[name])
    # And so is the folder at α, which `eval` and `find-alpha` turn.
    result = tmp_path / "run" / "result"
    if method == "osf":
        with pytest.raises(UserError, match="no coefficient before it is merged"):
            load(result, torch.float32, 0.5)
        return
    for alpha, path in stock.items():
        assert (logits(load(path)) - logits(load(result, torch.float32, alpha))).abs().max() < 1e-4
    assert torch.equal(logits(load(result, torch.float32, 0.0)), expected_base)
    turned = Interpolation(str(result))
    found = {}
    for alpha in (0.0, 0.5, 1.0):
        turned.set(alpha)
        found[alpha] = logits(turned.model)
    assert torch.equal(found[0.0], logits(load(tiny_base, turned.model.dtype)))
    assert not torch.equal(found[0.5], found[1.0]) and not torch.equal(found[0.5], found[0.0])


@TEXT_OR_ALL
def test_disel(sums: Path, kind: str, stage: int, ranks: int, tmp_path: Path) -> None:
    """Its gates train with the LoRAs, and are in what a run ends in, which is no LoRA without them."""
    tiny_base = make_base(tmp_path / "base", kind)
    fields = {"method": "disel", "lora_rank": 4, "dtype": "float32"}
    recipe = make_recipe(tmp_path / "r.yaml", tiny_base, tmp_path, sums, stage, **fields)
    trained = train_and_resume(recipe, ranks)
    gates = [tensor for name, tensor in trained.items() if name.endswith(".lora_gate.bias")]
    assert len(gates) == 7 * 4 and len(trained) == 4 * len(gates)
    moved = torch.cat(gates) + 0.6
    assert moved.abs().max() > 1e-3, "from σ(−3), where they start"

    model: Any = load(tiny_base, torch.float32)
    expected = logits(model)
    Disel(lora_rank=4).prepare(model)
    assert torch.equal(logits(model), expected), "exact at step 0"
    seen: dict[str, Any] = {}
    layer = next(module for module in model.modules() if hasattr(module, "lora_gate"))
    layer.lora_A["default"].register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], gated=output))
    logits(model)
    shares = seen["gated"] / torch.nn.functional.linear(seen["x"], layer.lora_A["default"].weight)
    assert shares.min() > 0 and float(shares.median()) == pytest.approx(0.047, abs=0.02), "nearly shut: σ(−3)"

    model.load_state_dict(trained, strict=False)
    result = tmp_path / "run" / "result"
    loaded = load(result, torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    with base_inside(loaded):
        assert torch.equal(logits(loaded), expected)
    with pytest.raises(UserError, match="disel: its gates read the input"):
        consolidate(str(tmp_path / "run"), str(tmp_path / "stock"))


@TEXT_OR_ALL
def test_adapter(sums: Path, kind: str, stage: int, ranks: int, tmp_path: Path) -> None:
    tiny_base = make_base(tmp_path / "base", kind)
    fields = {"method": "adapter", "adapter_size": 8, "dtype": "float32"}
    recipe = make_recipe(tmp_path / "r.yaml", tiny_base, tmp_path, sums, stage, **fields)
    trained = train_and_resume(recipe, ranks)
    assert len(trained) == 4 * 4 and all(".mlp.adapter." in name for name in trained)

    expected = logits(load(tiny_base, torch.float32))
    model: Any = load(tiny_base, torch.float32)
    Adapter(adapter_size=8).prepare(model)
    assert torch.equal(logits(model), expected), "exact at step 0"
    model.load_state_dict(trained, strict=False)
    result = tmp_path / "run" / "result"
    assert torch.equal(logits(load(result, torch.float32)), logits(model))
    assert torch.equal(logits(load(result, torch.float32, alpha=0)), expected)
    assert (logits(model) - expected).abs().max() > 1e-2
    with pytest.raises(UserError, match="adapter: a bottleneck is not linear"):
        consolidate(str(tmp_path / "run"), str(tmp_path / "stock"))

    # The run's own validation loss, from the folder, by the command.
    seen = json.loads((tmp_path / "run" / "COMPLETE").read_text())["validation_loss"]
    on_validation = read_recipe(str(recipe), {"test_split": "validation"})
    assert evaluate(str(result), on_validation, samples=1)["task"]["loss"] == pytest.approx(seen, abs=0.05)
    (result / "adapter.json").write_text((result / "adapter.json").read_text().replace(": 8", ": 9"))
    with pytest.raises(UserError, match="does not fit"):
        load(result)
