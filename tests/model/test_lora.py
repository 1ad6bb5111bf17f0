"""Adapters that PEFT has made, not merged: which have an interpolation coefficient, and which do not."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import grow
from grow.errors import UserError
from grow.evaluation.interpolation import check_alphas, holds_base
from grow.model.alpha import base_inside, has_base_inside, set_alpha
from grow.model.loading import load
from tests.helpers.tiny import logits

TARGETS = ["q_proj", "down_proj"]


def adapted(base: Path, config: Any) -> Any:
    """A model as PEFT makes it, as if trained."""
    model = peft.get_peft_model(load(base, torch.float32), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"lora_bias": True}, {"target_modules": ["embed_tokens"]}]
)
def test_loras_are_scaled(text_base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    model = adapted(text_base, peft.LoraConfig(r=4, **({"target_modules": TARGETS} | fields)))
    base, trained = logits(load(text_base, torch.float32)), logits(model)
    assert not torch.allclose(base, trained, atol=1e-3)
    model.save_pretrained(tmp_path / "lora")
    check_alphas(str(tmp_path / "lora"), "", (0, 0.5, 1))
    loaded: Any = load(tmp_path / "lora", torch.float32, 0.5)
    set_alpha(model, 0.5)
    half = logits(model)
    assert torch.allclose(logits(loaded), half, atol=1e-5)
    assert not torch.allclose(half, base, atol=1e-3) and not torch.allclose(half, trained, atol=1e-3)
    for one in (model, loaded):
        with base_inside(one):
            assert torch.equal(logits(one), base)
        assert torch.allclose(logits(one), half, atol=1e-5)
        set_alpha(one, 1)
        assert torch.allclose(logits(one), trained, atol=1e-5)
        set_alpha(one, 0)
        assert torch.equal(logits(one), base)


@pytest.mark.parametrize(
    ("named", "config"),
    [
        ("use_dora", peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)),
        ("modules_to_save", peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["norm"])),
        ("trainable_token_indices", peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3])),
        ("init_lora_weights: pissa", peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")),
        ("bias: all", peft.LoraConfig(r=4, target_modules=TARGETS, bias="all")),
        ("IA3", peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])),
    ],
)
def test_others_have_no_coefficient(text_base: Path, tmp_path: Path, named: str, config: Any) -> None:
    model = adapted(text_base, config)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    for one in (model, load(tmp_path / "adapter", torch.float32)):
        assert not has_base_inside(one)
        with pytest.raises(UserError, match=named), base_inside(one):
            pass
        with pytest.raises(UserError, match=named):
            set_alpha(one, 0.5)
        assert torch.allclose(logits(one), trained, atol=1e-5)
    assert not holds_base(tmp_path / "adapter")
    check_alphas(str(tmp_path / "adapter"), "", (1,))
    with pytest.raises(UserError, match=named):
        check_alphas(str(tmp_path / "adapter"), "", (0.5, 1))


def test_what_is_not_whole_is_refused(text_base: Path, tmp_path: Path) -> None:
    adapted(text_base, peft.LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    whole = dict(tensors)
    name = next(iter(tensors))
    for changed, message in (
        ({key: tensor for key, tensor in whole.items() if key != name}, "is missing"),
        (
            whole | {name.replace("down_proj", "gate_proj"): whole[name].clone()},
            "gate_proj.lora_A.weight has no place",
        ),
    ):
        save_file(changed, tmp_path / "lora" / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "lora")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted(text_base, prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(UserError, match="in the prompt"):
        load(tmp_path / "prompts")
    # A LoRA of copies, on a base that has none.
    grown = grow.grow_model(load(text_base, torch.float32))
    copies = peft.LoraConfig(r=4, target_modules="all-linear")
    peft.get_peft_model(grown, copies).save_pretrained(tmp_path / "of copies")
    with pytest.raises(UserError, match="has no place"):
        load(tmp_path / "of copies")


def test_adapters_that_come_and_go(text_base: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    model = adapted(text_base, config)
    trained = logits(model)
    set_alpha(model, 0.5)
    with base_inside(model):
        pass
    model.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False))
    model.set_adapter("two")
    two = logits(model)  # as its own scaling has it
    for alpha in (0.25, 1):
        set_alpha(model, alpha)
    assert torch.equal(logits(model), two)
    model.set_adapter("default")
    assert torch.allclose(logits(model), trained, atol=1e-5)
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge_adapter"):
        set_alpha(model, 0)
    model.unmerge_adapter()
    set_alpha(model, 0)
    assert torch.allclose(logits(model), logits(load(text_base, torch.float32)), atol=1e-5)
