"""`import grow`: growth in memory, for training loops of one's own, is the growth of the commands."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import dispatch_model
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import grow
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth
from grow.checkpoint.verify import verify
from grow.data.tokenizer import load_tokenizer
from grow.evaluation.logits import compare_logits
from grow.model.loading import load
from tests.helpers.running import consolidate, train
from tests.helpers.tiny import ROOT, file_checksum, folder_checksums, free_ports, logits, make_base, make_recipe, tokens


def base_model(path: Path, dtype: Any = torch.float32) -> Any:
    return load(path, dtype)


def shaken(model: Any) -> Any:
    """As if trained: what trains has moved."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def loop(model: Any, parameters: list[Any]) -> None:
    """The ten lines of one's own."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for step in range(3):
        ids = tokens(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def sft_trainer(model: Any, base: Path, out: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(32)])
    settings = SFTConfig(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer).train()
    model.eval()


@pytest.mark.parametrize("method", ["g_freeze", "g_train"])
@pytest.mark.parametrize("way", ["loop", "trl"])
def test_ones_own_training(text_base: Path, tmp_path: Path, way: str, method: str) -> None:
    expected = logits(base_model(text_base))
    model = base_model(text_base)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    assert grow.grow_model(model, layers="1-2") is model
    assert torch.equal(logits(model), expected), "the same function at step 0"
    parameters = grow.trainable(model, method)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    loop(model, parameters) if way == "loop" else sft_trainer(model, text_base, tmp_path / "trl")
    trained = logits(model.cpu())
    assert not torch.equal(trained, expected)
    assert all(torch.equal(model.state_dict()[name].cpu(), value) for name, value in frozen.items())

    grow.save_growth(model, tmp_path / "package")
    again = grow.attach(base_model(text_base), tmp_path / "package")
    assert torch.equal(logits(again), trained)
    grow.set_alpha(again, 0)
    assert torch.equal(logits(again), expected)
    grow.set_alpha(again, 0.5)
    assert not torch.equal(logits(again), trained)
    half = logits(again)

    # A stock checkpoint, at the coefficient that the model is at.
    grow.to_stock(again, tmp_path / "half", uniform=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert load_tokenizer(str(tmp_path / "half"))("1+1").input_ids == load_tokenizer(str(text_base))("1+1").input_ids
    assert type(stock) is transformers.Gemma3ForCausalLM and stock.config.intermediate_size == 96
    assert torch.allclose(logits(stock.eval()), half, atol=1e-4)
    with pytest.raises(grow.UserError, match="uniform"):
        grow.to_stock(again, tmp_path / "other")
    with pytest.raises(grow.UserError, match="already there"):
        grow.to_stock(again, tmp_path / "half", uniform=True)

    # The commands take the package too: the base's files are known by it, and come out again.
    made = attach_growth(str(text_base), str(tmp_path / "package"), str(tmp_path / "grown"))
    assert made["rounded"] == "F32 to BF16"
    assert not verify(str(tmp_path / "grown"), str(text_base))["problems"]
    assert torch.allclose(logits(grow.load(tmp_path / "grown", torch.float32)), trained, atol=0.05)
    extract_base(str(tmp_path / "grown"), str(tmp_path / "base"))
    assert folder_checksums(tmp_path / "base").items() <= folder_checksums(text_base).items()


@pytest.mark.parametrize(("factor", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16)])
def test_growth_in_memory_is_that_of_files(tiny_base: Path, tmp_path: Path, factor: int, dtype: Any) -> None:
    expand(str(tiny_base), str(tmp_path / "grown"), factor=factor, layers="0,2")
    model = grow.grow_model(base_model(tiny_base, dtype), layers=[0, 2], factor=factor)
    expected = load(tmp_path / "grown", dtype)
    if factor == 2:
        own = model.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in expected.state_dict().items())
        assert torch.equal(logits(model), logits(base_model(tiny_base, dtype)))
    else:
        assert torch.allclose(logits(model).float(), logits(expected).float(), atol=0.1)

    grow.trainable(model)
    grow.save_growth(shaken(model), tmp_path / "package")
    attach_growth(str(tiny_base), str(tmp_path / "package"), str(tmp_path / "attached"))
    assert not verify(str(tmp_path / "attached"), str(tiny_base))["problems"]
    if dtype == torch.bfloat16:  # the files' own: nothing is rounded
        assert torch.equal(logits(load(tmp_path / "attached", dtype)), logits(model))
        # And the other way round.
        extract_growth(str(tmp_path / "attached"), str(tmp_path / "taken"))
        again = grow.attach(base_model(tiny_base, dtype), tmp_path / "taken")
        assert torch.equal(logits(again), logits(model))


def test_a_base_without_files(text_base: Path, tmp_path: Path) -> None:
    """A model that was made in memory is known by its tensors; its growth goes on the same model saved, in any type."""
    model = base_model(text_base)
    model.config._name_or_path = model.name_or_path = ""
    model.save_pretrained(tmp_path / "later")
    grow.grow_model(model)
    grow.trainable(model)
    grow.save_growth(shaken(model), tmp_path / "package")
    facts = json.loads((tmp_path / "package" / "growth.json").read_text())
    assert facts["base"]["files"] == {} and len(facts["base_tensors"]) > 10
    attach_growth(str(tmp_path / "later"), str(tmp_path / "package"), str(tmp_path / "grown"))
    assert not verify(str(tmp_path / "grown"), str(tmp_path / "later"))["problems"]
    assert torch.equal(logits(grow.load(tmp_path / "grown")), logits(model))
    assert torch.equal(logits(grow.attach(base_model(text_base), tmp_path / "package")), logits(model))


def test_a_run_is_opened(text_base: Path, sums: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"))
    for method in ("g_train", "lora", "adapter"):
        run = tmp_path / method
        fields = {"method": method, "dtype": "float32", "output_dir": str(run)}
        train(make_recipe(tmp_path / f"{method}.yaml", text_base, tmp_path / "grown", sums, 2, **fields), 1)
        model = grow.load(run, torch.float32)
        if method != "adapter":
            consolidate(str(run), str(tmp_path / f"{method}-stock"), dtype="float32")
            expected = logits(load(tmp_path / f"{method}-stock", torch.float32))
            assert torch.allclose(logits(model), expected, atol=1e-4)
        assert not torch.allclose(logits(model), logits(base_model(text_base)), atol=1e-3)
    assert torch.equal(logits(grow.load(tmp_path / "g_train", torch.float32, 0.0)), logits(base_model(text_base)))
    with pytest.raises(grow.UserError, match="consolidate it first"):
        grow.load(tmp_path / "lora", alpha=0.5)
    with pytest.raises(grow.UserError, match="growth package"):
        grow.load(tmp_path / "g_train" / "result")


def test_mistakes(text_base: Path, tmp_path: Path) -> None:
    model = base_model(text_base)
    for call, message in (
        (lambda: grow.trainable(model), "has not grown"),
        (lambda: grow.grow_model(model, layers="9"), "layer 9 does not exist"),
        (lambda: grow.grow_model(model, factor=1), "whole number"),
        (lambda: grow.attach(model, tmp_path), "growth.json"),
        (lambda: grow.save_growth(model, tmp_path / "package"), "has not grown"),
        (lambda: grow.grow_model(transformers.OPTForCausalLM(transformers.OPTConfig(num_hidden_layers=1))), "no MLP"),
    ):
        with pytest.raises(grow.UserError, match=message):
            call()
    grow.grow_model(model)
    for call, message in (
        (lambda: grow.grow_model(model), "is grown already"),
        (lambda: grow.trainable(model, "sft"), "g_freeze and g_train"),
    ):
        with pytest.raises(grow.UserError, match=message):
            call()
    grow.trainable(model)
    grow.save_growth(shaken(model), tmp_path / "package")
    with pytest.raises(grow.UserError, match="grew from another base"):
        grow.attach(base_model(make_base(tmp_path / "other", "text", seed=1)), tmp_path / "package")
    with pytest.raises(grow.UserError, match="is grown already"):
        grow.attach(model, tmp_path / "package")

    # A base that was trained as well is another base: it is said, and the growth is for that one.
    model.model.layers[0].mlp.gate_proj.weight.data += 1
    with pytest.warns(UserWarning, match="the base in memory is not that of"):
        grow.save_growth(model, tmp_path / "of-another")
    with pytest.raises(grow.UserError, match="grew from another base"):
        grow.attach(base_model(text_base), tmp_path / "of-another")


def test_matrices_that_lie_transposed(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=320)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = logits(model)
    grow.grow_model(model)
    assert torch.equal(logits(model), before)
    grow.trainable(model)
    grow.save_growth(shaken(model), tmp_path / "package")
    assert not torch.equal(logits(model), before)


def test_the_readmes_example(text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for the name of the base and the number of steps."""
    code = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("google/gemma-3-1b-pt", str(text_base)).replace("max_steps=100", "max_steps=2")
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(32)])
    names: dict[str, Any] = {"rows": rows}
    exec(compile(code, "README.md", "exec"), names)
    trained, base = names["model"].cpu().eval(), names["base"].eval()
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gemma-half")
    assert torch.allclose(logits(stock.eval()), logits(base), atol=1e-4)
    grow.set_alpha(base, 1)
    assert torch.equal(logits(base), logits(trained))


WRAPPERS: dict[str, Any] = {
    "compile": torch.compile,
    "data parallel": torch.nn.DataParallel,
    # As `device_map` does it where a model is on several devices: each module has a forward pass of its own.
    "devices": lambda model: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "peft, merged": lambda model: peft.get_peft_model(model, LORA).merge_and_unload(),
}
LORA = peft.LoraConfig(r=4, target_modules=["q_proj"])


@pytest.mark.parametrize("attention", ["", "queries"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_within_a_wrapper(text_base: Path, tmp_path: Path, wrapper: str, attention: str) -> None:
    parts = {"attention": attention} if attention else {"layers": "all"}
    plain = grow.grow_model(base_model(text_base), **parts)
    grow.trainable(plain)
    grow.save_growth(shaken(plain), tmp_path / "package")
    model = WRAPPERS[wrapper](base_model(text_base))
    assert grow.grow_model(model, **parts) is model
    shaken_as_well = [p.data.copy_(own) for p, own in zip(grow.trainable(model), grow.trainable(plain), strict=True)]
    assert shaken_as_well
    grow.save_growth(model, tmp_path / "own")
    tensors = {path.name: file_checksum(path) for path in (tmp_path / "own").glob("*.safetensors")}
    assert tensors == {path.name: file_checksum(path) for path in (tmp_path / "package").glob("*.safetensors")}
    again = WRAPPERS[wrapper](base_model(text_base))
    assert grow.attach(again, tmp_path / "package") is again
    if wrapper != "compile":  # which would take a minute
        assert torch.equal(logits(again), logits(plain)) and torch.equal(logits(model), logits(plain))
    grow.to_stock(again, tmp_path / "stock")
    assert torch.allclose(logits(load(tmp_path / "stock", torch.float32)), logits(plain), atol=1e-4)


def test_what_would_compute_in_place_of_growth_is_refused(text_base: Path) -> None:
    model = base_model(text_base)
    for layer in model.model.layers:  # as Liger binds its own
        layer.mlp.__dict__["forward"] = type(layer.mlp).forward.__get__(layer.mlp)
    with pytest.raises(grow.UserError, match="grow the model first"):
        grow.grow_model(model)


def test_loras_among_growth_are_refused(text_base: Path, tmp_path: Path) -> None:
    model = grow.grow_model(base_model(text_base))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for call in (grow.save_growth, grow.to_stock):
        with pytest.raises(grow.UserError, match="merge_and_unload"):
            call(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    grow.save_growth(adapted.merge_and_unload(), tmp_path / "out")
    assert torch.equal(logits(grow.attach(base_model(text_base), tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("own", "grew", "there"),
    [
        ("float32", "float32", "bfloat16"),
        ("bfloat16", "float32", "float16"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_a_base_in_another_type(text_base: Path, tmp_path: Path, own: str, grew: str, there: str) -> None:
    """One that rounds what stands in the base's files, where the growth grew or where it goes."""
    base, model = tmp_path / "base", base_model(text_base)
    shutil.copytree(text_base, base)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.03 * torch.rand(parameter.shape, generator=generator)
    model.to(getattr(torch, own)).save_pretrained(base)
    grown = grow.grow_model(base_model(base, getattr(torch, grew)))
    grow.trainable(grown)
    grow.save_growth(shaken(grown), tmp_path / "package")
    again = grow.attach(base_model(base, getattr(torch, there)), tmp_path / "package")
    assert torch.allclose(logits(again).float(), logits(grown).float(), atol=0.3)
    attach_growth(str(base), str(tmp_path / "package"), str(tmp_path / "grown"))
    assert not verify(str(tmp_path / "grown"), str(base))["problems"]
    with pytest.raises(grow.UserError, match="another base"):
        grow.attach(base_model(text_base, getattr(torch, there)), tmp_path / "package")


def test_a_generation_config_that_cannot_be_saved(text_base: Path, tmp_path: Path) -> None:
    model: Any = grow.grow_model(base_model(text_base))
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(grow.UserError, match="generation_config"):
        grow.to_stock(model, tmp_path / "stock")
    assert not list(tmp_path.iterdir())


def test_a_class_that_does_not_generate(text_base: Path, tmp_path: Path) -> None:
    model = grow.grow_model(transformers.AutoModel.from_pretrained(text_base, dtype=torch.float32))
    model.generation_config = None
    ids = tokens()
    expected = model(ids).last_hidden_state
    grow.to_stock(model, tmp_path / "stock")
    stock = transformers.AutoModel.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert torch.allclose(stock(ids).last_hidden_state, expected, atol=1e-4)
    stock.save_pretrained(tmp_path / "base")
    load_tokenizer(str(text_base)).save_pretrained(tmp_path / "base")
    expand(str(tmp_path / "base"), str(tmp_path / "grown"))
    found = compare_logits(str(tmp_path / "grown"), str(tmp_path / "base"))
    assert [of["difference"] for of in found.values()] == [0, 0]


@pytest.mark.full  # DeepSpeed alone takes half a minute to begin
def test_partitions_are_refused(text_base: Path, tmp_path: Path) -> None:
    """What ZeRO-3 has taken apart is not there; within GatheredParameters it is."""
    code = f"""
import deepspeed, grow, torch
from grow.model.loading import load
deepspeed.init_distributed("gloo", rank=0, world_size=1, verbose=False)
model = grow.grow_model(load({str(text_base)!r}, torch.float32))
deepspeed.zero.Init(module=model, config_dict_or_path={{"train_batch_size": 1, "zero_optimization": {{"stage": 3}}}})
try:
    grow.save_growth(model, {str(tmp_path / "out")!r})
except grow.UserError as error:
    print(error)
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    grow.save_growth(model, {str(tmp_path / "out")!r})
"""
    env = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "in partitions (ZeRO-3)" in done.stdout, done.stderr[-2000:]
    assert torch.equal(
        logits(grow.attach(base_model(text_base), tmp_path / "out")), logits(grow.grow_model(base_model(text_base)))
    )


def test_the_import_is_fast() -> None:
    code = "import sys, grow; dir(grow); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="no attribute"):
        grow.nothing  # noqa: B018
