"""A tower for images whose MLPs have grown, and a projector that trains: exact at step 0, back to stock, and alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

import grow
from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth
from grow.checkpoint.skills import attach_skills
from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.evaluation.find_alpha import find_alpha
from grow.evaluation.logits import compare_logits
from grow.model.alpha import set_alpha
from grow.model.images import image_features
from grow.model.loading import load
from tests.checkpoint.test_architectures import E2B
from tests.checkpoint.test_attention_heads import move
from tests.helpers.checkpoints import edit_json
from tests.helpers.running import here
from tests.helpers.tiny import (
    TEXT_CONFIG,
    VISION_CONFIG,
    folder_checksums,
    make_base,
    make_tokenizer,
    tokens,
    written_scores,
)

BOTH: dict[str, Any] = {"layers": "none", "tower": "vision", "train_projector": True}

KINDS = ["gemma3", "llava", "gemma4", "gemma4-clips", "vit", "dinov2", "internvl", "pixtral", "mistral3"]
OF_LLAVA = {"llava": "clip_vision_model", "vit": "vit", "dinov2": "dinov2", "pixtral": "pixtral"}


def base_of(folder: Path, kind: str) -> Path:
    """Gemma 3 as on the hub, with SigLIP; Gemma 4, whose tower has gates and may clip what goes through its matrices;
    or a Llama below CLIP, ViT, DINOv2, InternVL's tower or Pixtral's, in LLaVA's class or in one of their own."""
    if kind == "gemma3":
        return make_base(folder, "multimodal")
    if kind.startswith("gemma4"):
        return make_gemma4(folder, clips=kind == "gemma4-clips")
    torch.manual_seed(0)
    text = {key: value for key, value in TEXT_CONFIG.items() if "query_pre" not in key and key != "sliding_window"}
    parts: dict[str, Any] = {"text_config": {"model_type": "llama", **text}}
    tower = {**VISION_CONFIG, "projection_dim": 16, "model_type": OF_LLAVA.get(kind, "pixtral")}
    tower |= {"mlp_ratio": 3} if kind == "dinov2" else {}
    tower |= {"head_dim": 8} if tower["model_type"] == "pixtral" else {}
    model: Any
    if kind in OF_LLAVA:
        parts |= {"image_token_index": 259, "vision_feature_layer": -1, "image_seq_length": 16}
        whole = "full" if kind == "pixtral" else "default"
        config = transformers.LlavaConfig(vision_config=tower, vision_feature_select_strategy=whole, **parts)
        model = transformers.LlavaForConditionalGeneration(config)
    elif kind == "mistral3":
        parts["text_config"]["model_type"] = "mistral"
        model = transformers.Mistral3ForConditionalGeneration(
            transformers.Mistral3Config(vision_config=tower, image_token_index=259, **parts)
        )
    else:
        sizes = {"image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
        model = transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig(vision_config=tower | sizes, image_token_id=259, image_seq_length=4, **parts)
        )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_gemma4(folder: Path, clips: bool) -> Path:
    ids = {"image_token_id": 259, "boi_token_id": 260, "eoi_token_id": 261, "audio_token_id": 262}
    config = E2B | ids | {"vision_config": E2B["vision_config"] | {"use_clipped_linears": clips}}
    if not clips:  # as in the 31B, tokens of an image see each other
        config["text_config"] = E2B["text_config"] | {"use_bidirectional_attention": "vision"}
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(transformers.Gemma4Config(**config))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    for name, bound in model.model.vision_tower.named_buffers():
        if name.endswith(("_min", "_max")):
            limit = (0.001 if "output" in name else 0.005) if "down_proj" in name else 0.2  # each clips something
            bound.fill_(limit if name.endswith("max") else -limit)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    names = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>", "audio_token": "<snd>"}
    names |= {"boa_token": "<boa>", "eoa_token": "<eoa>"}
    transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names).save_pretrained(folder)
    Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70).save_pretrained(folder)
    return folder


def seen(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A picture between texts."""
    if kind.startswith("gemma4"):
        patches = torch.rand((1, 36, 48), generator=torch.Generator().manual_seed(0)).to(dtype)
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
        ids = torch.cat([tokens(8), torch.full((1, 4), 259), tokens(8, 2)], dim=1)
        types = {"mm_token_type_ids": (ids == 259).long()}
        return {"input_ids": ids, "pixel_values": patches, "image_position_ids": places, **types}
    image = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.cat([tokens(8), torch.full((1, 16 if kind in OF_LLAVA else 4), 259), tokens(8, 2)], dim=1)
    more = {"token_type_ids": (ids == 259).long()} if kind == "gemma3" else {}
    more |= {"image_sizes": torch.tensor([[16, 16]])} if kind == "mistral3" else {}
    return {"input_ids": ids, "pixel_values": image, **more}


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**seen(kind, model.dtype)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_its_base(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """All logits are equal, in a pass and token by token; and once moved, at α = 0. The base comes out again."""
    base, grown = base_of(tmp_path / "base", kind), tmp_path / "grown"
    expand(str(base), str(grown), **(BOTH | {"train_projector": kind.startswith("gemma")}))
    assert verify(str(grown), str(base))["problems"] == []
    models = [load(path, dtype) for path in (base, grown)]
    assert torch.equal(*(logits(model, kind) for model in models))
    assert torch.equal(*(written_scores(model, **seen(kind, dtype)) for model in models))
    move(grown)
    moved = load(grown, dtype)
    assert not torch.equal(logits(moved, kind), logits(models[0], kind))
    set_alpha(moved, 0)
    assert torch.equal(logits(moved, kind), logits(models[0], kind))
    extract_base(str(grown), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == folder_checksums(base)


@pytest.mark.parametrize("kind", KINDS)
def test_its_stock_form(tmp_path: Path, kind: str) -> None:
    """Of one layer of the tower, padded, with the projector and an MLP of the language model; at α = 0.5 too."""
    before = E2B["vision_config"] if kind.startswith("gemma4") else VISION_CONFIG
    width = 3 * before["hidden_size"] if kind == "dinov2" else before["intermediate_size"]
    base, grown = base_of(tmp_path / "base", kind), tmp_path / "grown"
    expand(
        str(base),
        str(grown),
        **(BOTH | {"layers": "all", "tower_layers": "1", "train_projector": kind.startswith("gemma")}),
    )
    move(grown)
    model: Any = load(grown, torch.float32)
    for alpha in (1.0, 0.5):
        with pytest.raises(UserError, match=r"layers \[0\] of the tower .* --uniform"):
            consolidate(str(grown), str(tmp_path / "no"), alpha=alpha)
        consolidate(str(grown), str(tmp_path / f"{alpha}"), alpha=alpha, uniform=True, dtype="float32")
        stock: Any = type(load(base)).from_pretrained(tmp_path / f"{alpha}", dtype=torch.float32).eval()
        said = stock.config.vision_config
        assert (16 * said.mlp_ratio if kind == "dinov2" else said.intermediate_size) == 2 * width
        set_alpha(model, alpha)
        assert torch.allclose(logits(stock, kind), logits(model, kind), atol=1e-3)
        assert not any(tensor.isnan().any() for tensor in stock.state_dict().values()), "bounds may be infinite"
        of_image = compare_logits(str(grown), str(tmp_path / f"{alpha}"), alpha=alpha)["float32, of an image"]
        assert of_image["difference"] < 1e-5 < of_image["largest"]


@pytest.mark.parametrize("newer", [False, True])
def test_where_its_stock_form_goes(tmp_path: Path, capsys: pytest.CaptureFixture, newer: bool) -> None:
    """What vLLM looks for, the hub's names of tensors, files that a newer transformers has written lack."""
    base, grown = base_of(tmp_path / "base", "gemma3"), tmp_path / "grown"
    if newer:
        model: Any = load(base)
        type(model)(model.config).save_pretrained(tmp_path / "newer")
        make_tokenizer(tmp_path / "newer")
        base = tmp_path / "newer"
    expand(str(base), str(grown), tower="vision")
    for program in ("vllm", "llama.cpp"):
        said = here(capsys, "consolidate", grown, tmp_path / program, "--for", program)
        assert ("vision_tower.vision_model.…, as the hub has them" in said) == (newer and program == "vllm")
        assert "tried" not in said


def test_g_train_between_base_and_stock_form(tmp_path: Path) -> None:
    """Where layers clip, what lies between the base's up-projection and the trained one is clipped, as in one MLP."""
    base = base_of(tmp_path / "base", "gemma4-clips")
    model: Any = grow.grow_model(load(base, torch.float32), "none", tower="vision")
    generator = torch.Generator().manual_seed(0)
    for parameter in grow.trainable(model, "g_train"):
        parameter.data += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    set_alpha(model, 0.5)
    grow.to_stock(model, tmp_path / "stock")
    stock: Any = load(tmp_path / "stock", torch.float32)
    seen_by = [torch.cat(image_features(one, inputs_of_image())) for one in (model, stock, load(base, torch.float32))]
    assert torch.allclose(seen_by[0], seen_by[1], atol=1e-5) and not torch.allclose(seen_by[0], seen_by[2], atol=1e-2)


def inputs_of_image() -> dict[str, Any]:
    return {name: value for name, value in seen("gemma4").items() if name in ("pixel_values", "image_position_ids")}


def test_a_class_that_asks_for_more_than_pixels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What LLaVA-NeXT makes of an image is not compared, and that is said."""
    text = {key: value for key, value in TEXT_CONFIG.items() if "query_pre" not in key and key != "sliding_window"}
    vision = {"model_type": "clip_vision_model", **VISION_CONFIG, "projection_dim": 16}
    config = transformers.LlavaNextConfig(text_config={"model_type": "llama", **text}, vision_config=vision)
    transformers.LlavaNextForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    expand(str(tmp_path / "base"), str(tmp_path / "grown"), tower="vision")
    said = here(capsys, "verify", tmp_path / "grown", "--base", tmp_path / "base", "--forward")
    assert "float32, of an image: not compared, its class asks for image_sizes" in said


def test_what_text_does_not_show(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A projector that has moved computes what its base does of text: `verify --forward` sees it all the same, and
    `find-alpha` does not measure it. By any factor it starts exact."""
    base, grown = base_of(tmp_path / "base", "gemma3"), tmp_path / "grown"
    expand(str(base), str(grown), factor=3, train_projector=True)
    assert compare_logits(str(grown), str(base))["float32, of an image"]["difference"] == 0
    said = here(capsys, "verify", grown, "--base", base, "--forward")
    assert "of an image" in said
    move(grown)
    found = compare_logits(str(grown), str(base))
    assert found["float32"]["difference"] == 0 and found["bfloat16, of an image"]["difference"] > 0
    (tmp_path / "text.txt").write_text("Some text.\n\nAnd more of it.")
    with pytest.raises(UserError, match="of which the KL of text says nothing"):
        find_alpha(str(grown), "", str(tmp_path / "text.txt"), 2, 0.1)


def test_layers_of_a_tower_that_are_not_used(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llava")
    edit_json(base / "config.json", vision_feature_layer=-2)
    assert "1 layer (0) of the tower" in expand(str(base), str(tmp_path / "grown"), tower="vision")["grown"]
    with pytest.raises(UserError, match="what layers 1 compute is not used"):
        expand(str(base), str(tmp_path / "no"), tower="vision", tower_layers="1")


def test_a_head_of_the_tower_that_is_as_wide(tmp_path: Path) -> None:
    """SigLIP's own, which a stock model would want as wide as the layers' MLPs."""
    torch.manual_seed(0)
    text = {key: value for key, value in TEXT_CONFIG.items() if "query_pre" not in key and key != "sliding_window"}
    vision = VISION_CONFIG | {"model_type": "siglip_vision_model", "vision_use_head": True}
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **text}, vision_config=vision)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"vision_tower.*head\.mlp\.fc1\.\w+ is as wide as the layers' MLPs"):
        expand(str(tmp_path / "base"), str(tmp_path / "no"), tower="vision")


@pytest.mark.parametrize("kind", ["gemma3", "vit", "mistral3"])
def test_a_package_and_a_model_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    base, grown = base_of(tmp_path / "base", kind), tmp_path / "grown"
    projector = kind == "gemma3"
    flags = ["--train-projector"] * projector + ["--attention", "queries"]
    said = here(capsys, "expand", base, grown, "--tower", "vision", *flags)
    assert "the query heads of 4 layers (0-3); the MLPs of 2 layers (0-1) of the tower for images, 2 times" in said
    move(grown)
    extract_growth(str(grown), str(tmp_path / "package"))
    attach_growth(str(base), str(tmp_path / "package"), str(tmp_path / "again"))
    expected = logits(load(grown, torch.float32), kind)
    assert torch.equal(logits(load(tmp_path / "again", torch.float32), kind), expected)
    with pytest.raises(UserError, match="tower for images cannot be one of several"):
        attach_skills(str(base), {"a": str(tmp_path / "package"), "b": str(tmp_path / "package")}, "no", {})

    model: Any = load(base, torch.float32)
    before = logits(model, kind)
    grow.grow_model(model, [], tower="vision", tower_layers=[1], train_projector=projector)
    assert torch.equal(logits(model, kind), before)
    trained = grow.trainable(model, "g_train")
    matrices = 3 if kind == "mistral3" else 2
    biases = 0 if kind == "mistral3" else 3
    assert len(trained) == 2 * matrices - 1 + biases + projector, (
        "the copies, the original up-projection, the projector"
    )
    for parameter in trained:
        parameter.data.mul_(1.5)
    after = logits(model, kind)
    grow.save_growth(model, tmp_path / "saved")
    other: Any = grow.attach(load(base, torch.float32), tmp_path / "saved")
    assert torch.equal(logits(other, kind), after) and not torch.equal(after, before)
    attach_growth(str(base), str(tmp_path / "saved"), str(tmp_path / "saved-again"))
    rounded = logits(load(tmp_path / "saved-again", torch.float32), kind)  # to the base's bf16
    assert (rounded - after).abs().max() < (before - after).abs().max() / 5
    grow.to_stock(other, tmp_path / "stock", uniform=True)
    assert torch.allclose(logits(load(tmp_path / "stock", torch.float32), kind), after, atol=1e-3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tower": "audio"}, "--tower audio: there is vision"),
        ({"tower": "vision", "tower_layers": "7"}, "--tower-layers 7: layer 7 does not exist"),
        ({"tower_layers": "1"}, "--tower-layers: says where, with --tower vision"),
        ({"tower": "vision", "copies_from": "BASE"}, "--copies-from: copies MLPs of the language model alone"),
    ],
)
def test_mistakes(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    base = base_of(tmp_path / "base", "gemma3")
    how = {key: str(base) if value == "BASE" else value for key, value in how.items()}
    with pytest.raises(UserError, match=message):
        expand(str(base), str(tmp_path / "out"), **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"tower": "vision"}, "no tower for images"), ({"train_projector": True}, "--train-projector: .*no tower for")],
)
def test_a_model_of_text_has_neither(text_base: Path, tmp_path: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(str(text_base), str(tmp_path / "out"), layers="none", **how)
