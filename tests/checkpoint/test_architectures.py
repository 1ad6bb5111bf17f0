"""Every checkpoint people have: classes, dtypes, layouts; and those that cannot be grown, refused by name."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import extract_base
from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.evaluation.logits import compare_logits
from grow.model.loading import load
from grow.names import layer_of, of_language_model
from grow.plan import setting
from tests.helpers import tiny
from tests.helpers.tiny import TEXT_CONFIG, folder_checksums, make_base, make_tokenizer, tokens

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
_RENAMED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
GPT: dict[str, Any] = dict.fromkeys(_RENAMED) | {
    "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 2, "n_positions": 256
}  # fmt: skip
CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {}),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "llama-biases": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"mlp_bias": True}),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {}),
    # Gate and up are the halves of one matrix.
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, {"pad_token_id": 0}),
    "glm4": (transformers.Glm4ForCausalLM, transformers.Glm4Config, {"pad_token_id": 0}),
    # Without a gate.
    "arcee": (transformers.ArceeForCausalLM, transformers.ArceeConfig, {"mlp_bias": True}),
    "nemotron": (transformers.NemotronForCausalLM, transformers.NemotronConfig, {}),
    "phi": (transformers.PhiForCausalLM, transformers.PhiConfig, {}),
    "starcoder2": (transformers.Starcoder2ForCausalLM, transformers.Starcoder2Config, {"residual_dropout": 0.0}),
    # Their logits are scaled.
    "cohere": (transformers.CohereForCausalLM, transformers.CohereConfig, {"logit_scale": 0.25, "pad_token_id": 0}),
    "granite": (transformers.GraniteForCausalLM, transformers.GraniteConfig, {"logits_scaling": 3.0}),
    # Other names, and for GPT-2 matrices that lie transposed.
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT),
    "gptj": (transformers.GPTJForCausalLM, transformers.GPTJConfig, GPT | {"rotary_dim": 8}),
    "codegen": (
        transformers.CodeGenForCausalLM,
        transformers.CodeGenConfig,
        GPT | {"rotary_dim": 8, "n_head": 4},
    ),
    "gpt-bigcode": (transformers.GPTBigCodeForCausalLM, transformers.GPTBigCodeConfig, GPT),
    "gpt-neo": (
        transformers.GPTNeoForCausalLM,
        transformers.GPTNeoConfig,
        {"num_layers": 3, "num_heads": 2, "attention_types": [[["global"], 3]]},
    ),
    "pythia": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, {}),
    "falcon": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        {"ffn_hidden_size": 48, "intermediate_size": None, "head_dim": None, "new_decoder_architecture": True},
    ),
    # With an activation that is learnt; with one that is computed in fp32.
    "apertus": (transformers.ApertusForCausalLM, transformers.ApertusConfig, {"pad_token_id": 0}),
    "beam": (
        transformers.BeamForCausalLM,
        transformers.BeamConfig,
        {"mlp_layer_types": ["dense"] * 3, "pad_token_id": 0},
    ),
    # E2B's layout: layers that share keys and values have an MLP of twice the width, and embeddings a layer.
    "gemma4": (
        transformers.Gemma4ForCausalLM,
        transformers.Gemma4TextConfig,
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "global_head_dim": 16,
            "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # A width a layer, and layers of which only the largest neurons count.
    "gemma3n": (
        transformers.Gemma3nForCausalLM,
        transformers.Gemma3nTextConfig,
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [48, 48, 64, 96],
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 8, "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}  # fmt: skip
E2B: dict[str, Any] = {
    "text_config": SMALL | CLASSES["gemma4"][2],
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64,
    },
    "audio_config": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "subsampling_conv_channels": [8, 8],
        "output_proj_dims": 32,
    },
    "image_token_id": 300, "boi_token_id": 301, "eoi_token_id": 302, "audio_token_id": 303,
}  # fmt: skip
"""Gemma 4 E2B as it is on the hub, with towers for images and sound, small."""
CLASSES["gemma4-e2b"] = (transformers.Gemma4ForConditionalGeneration, lambda **_: transformers.Gemma4Config(**E2B), {})
WIDTHS = {"gemma4": 96, "gemma4-e2b": 96, "gemma3n": [48, 96, 128, 192]}
"""What `intermediate_size` is in the stock checkpoint, where not one width is doubled for all."""


def make(path: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """A small random model of a class, as stock transformers saves it."""
    cls, config_cls, more = CLASSES[kind]
    torch.manual_seed(0)
    known = {key: value for key, value in (SMALL | more | config).items() if value is not None}
    model = cls(config_cls(**known))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.to(dtype).save_pretrained(path)
    return path


def logits(path: Path, dtype: torch.dtype = torch.float32, alpha: float = 1.0, **inputs: Any) -> torch.Tensor:
    return tiny.logits(load(path, dtype, alpha), **inputs)


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_grows_and_comes_out_again(kind: str, tmp_path: Path) -> None:
    source, grown, stock = make(tmp_path / "source", kind), tmp_path / "grown", tmp_path / "stock"
    before = folder_checksums(source)
    expand(str(source), str(grown))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(grown, dtype), logits(source, dtype))
        assert torch.equal(*(tiny.written_scores(load(path, dtype)) for path in (grown, source)))
    assert verify(str(grown), str(source))["problems"] == []
    consolidate(str(grown), str(stock))
    model, info = CLASSES[kind][0].from_pretrained(stock, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert setting(model.config.get_text_config().to_dict(), "intermediate_size") == WIDTHS.get(kind, 96)
    assert (logits(stock) - logits(source)).abs().max() < 1e-4
    extract_base(str(grown), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == before == folder_checksums(source)


@pytest.mark.parametrize(
    ("kind", "layers", "width"), [("gemma4", "1,2", 96), ("gemma4", "3", 96), ("gemma3n", "2", [48, 48, 128, 96])]
)
def test_some_layers_of_different_widths(kind: str, layers: str, width: Any, tmp_path: Path) -> None:
    """Padded in proportion to what each layer had; not at all where the config has a width for each."""
    source, grown, stock = make(tmp_path / "source", kind), tmp_path / "grown", tmp_path / "stock"
    expand(str(source), str(grown), layers=layers)
    assert torch.equal(logits(grown), logits(source))
    if kind == "gemma4":
        with pytest.raises(UserError, match="add --uniform"):
            consolidate(str(grown), str(stock))
    consolidate(str(grown), str(stock), uniform=kind == "gemma4")
    model, info = CLASSES[kind][0].from_pretrained(stock, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.intermediate_size == width
    assert (logits(stock) - logits(source)).abs().max() < 1e-4


def test_neurons_that_depend_on_each_other_do_not_grow(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gemma3n")
    assert expand(str(source), str(tmp_path / "grown"))["layers"] == [1, 2, 3]
    with pytest.raises(UserError, match=r"--layers 0-2: the MLP keeps its largest neurons alone .* in layers 0; leave"):
        expand(str(source), str(tmp_path / "other"), layers="0-2")
    every = make(tmp_path / "every", "gemma3n", activation_sparsity_pattern=[0.95] * 4)
    with pytest.raises(UserError, match="in all of them, so nothing can grow"):
        expand(str(every), str(tmp_path / "other"))


def test_a_norm_within_the_mlp_is_refused_by_name(tmp_path: Path) -> None:
    """Of BitNet: over all hidden units, so that copies would change what the originals are."""
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**SMALL))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"model.layers.0.mlp.ffn_sub_norm.weight: what it does to copies"):
        expand(str(tmp_path / "source"), str(tmp_path / "grown"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    source, grown = make(tmp_path / "source", "llama", dtype), tmp_path / "grown"
    expand(str(source), str(grown))
    result = verify(str(grown), str(source))
    assert result["problems"] == [] and result["exact"] == (dtype == torch.float32)
    difference = (logits(grown) - logits(source)).abs().max()
    assert difference == 0 if dtype == torch.float32 else difference < 1e-3


@pytest.mark.parametrize("layout", ["hub", "newer"])
def test_images_go_through_the_multimodal_class(layout: str, tmp_path: Path) -> None:
    source, grown, stock = make_base(tmp_path / "source", "multimodal"), tmp_path / "grown", tmp_path / "stock"
    if layout == "newer":
        model = transformers.Gemma3ForConditionalGeneration.from_pretrained(source)
        shutil.rmtree(source)
        model.save_pretrained(source)
    before = folder_checksums(source)
    expand(str(source), str(grown))
    consolidate(str(grown), str(stock))
    image = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([tokens(8), torch.tensor([[260, 259, 259, 259, 259, 261]]), tokens(8, 2)], dim=1)
    types = (ids == 259).long()
    seen = {"input_ids": ids, "pixel_values": image, "token_type_ids": types}
    expected = logits(source, **seen)
    assert torch.equal(logits(grown, **seen), expected)
    assert (logits(stock, **seen) - expected).abs().max() < 1e-4
    assert not torch.equal(logits(source, **(seen | {"pixel_values": -image})), expected), "the image counts"
    extract_base(str(grown), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == before


def test_a_hub_cache_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is a folder of links; a name on the hub stands for the one in the cache."""
    cache = tmp_path / "hub" / "models--some--model"
    source, snapshot = make(tmp_path / "source", "llama"), cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    (source / "README.md").write_text("---\nlicense: gemma\n---\nA model.\n")
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(cache / "blobs" / str(number), snapshot))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for number, name in enumerate((str(snapshot), "some/model")):
        grown = tmp_path / f"grown{number}"
        expand(name, str(grown))
        assert not any(file.is_symlink() for file in grown.rglob("*"))
        assert torch.equal(logits(grown), logits(source))
        card = (grown / "README.md").read_text()
        assert "base_model: some/model" in card and "license: gemma" in card
        extract_base(str(grown), str(tmp_path / f"again{number}"))
        assert folder_checksums(tmp_path / f"again{number}") == folder_checksums(source)
    with pytest.raises(UserError, match="hf download some/other"):
        expand("some/other", str(tmp_path / "nothing"))


def rename(path: Path, *pairs: tuple[str, str]) -> None:
    tensors = load_file(path / "model.safetensors")
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "half fused": ([(".gate_proj.", ".gate_up_proj.")], {}, "lacks one of gate_proj"),
    "experts": ([(".mlp.", ".mlp.experts.0.")], {}, "mixture of experts"),
    "adapter": ([(".mlp.gate_proj.", ".mlp.gate_proj.lora_A.")], {}, "adapter"),
    "another gate": ([(".gate_proj.", ".fc1.")], {}, "lacks one of gate_proj"),
    "no gate": ([(".mlp.gate_proj.", ".other.gate_proj.")], {}, "lacks one of gate_proj"),
    "no layers": ([("model.layers", "model.blocks")], {}, "no MLP in it that can grow"),
    "quantized": ([], {"quantization_config": {"bits": 4}}, "quantized"),
    "a layer too few": ([("layers.1.mlp", "layers.1.other")], {}, r"layers \[0, 2\], its config speaks of 3"),
    "another width": ([], {"intermediate_size": 64}, "intermediate_size 64"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_grown_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    pairs, config, message = REFUSED[kind]
    source = make(tmp_path / "source", "llama")
    rename(source, *pairs)
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    with pytest.raises(UserError, match=message):
        expand(str(source), str(tmp_path / "grown"))
    assert [child.name for child in tmp_path.iterdir()] == ["source"]


def test_real_mixtral_and_adapter(tmp_path: Path) -> None:
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    mixtral.save_pretrained(tmp_path / "mixtral")
    with pytest.raises(UserError, match="mixture of experts"):
        expand(str(tmp_path / "mixtral"), str(tmp_path / "grown"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter"):
        expand(str(tmp_path / "adapter"), str(tmp_path / "grown"))


def test_the_best_layers_of_a_ranking(text_base: Path, tmp_path: Path) -> None:
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({"layers": [3, 1, 0, 2]}))
    assert expand(str(text_base), str(tmp_path / "grown"), layers=f"top:2:{ranking}")["layers"] == [1, 3]
    assert expand(str(text_base), str(tmp_path / "rest"), layers=f"bottom:2:{ranking}")["layers"] == [0, 2]
    for layers, message in ((f"top:5:{ranking}", "ranks only 4"), ("top:2:none.json", "none.json"), ("top:2", "top:N")):
        with pytest.raises(UserError, match=message):
            expand(str(text_base), str(tmp_path / "other"), layers=layers)


def test_gpt2_as_it_is_on_the_hub(tmp_path: Path) -> None:
    """Its names lack the class's prefix, its files hold masks, and its config leaves out the width."""
    source, hub = make(tmp_path / "source", "gpt2", n_inner=128), tmp_path / "hub"
    shutil.copytree(source, hub)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(3)}
    save_file(tensors | masks, hub / "model.safetensors", {"format": "pt"})
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "n_inner"}))
    for factor in (2, 3):
        grown, stock = tmp_path / f"grown{factor}", tmp_path / f"stock{factor}"
        expand(str(hub), str(grown), factor=factor, layers="0,2")
        assert verify(str(grown), str(hub))["problems"] == []
        assert torch.equal(logits(grown, alpha=0), logits(source))
        assert (logits(grown) - logits(source)).abs().max() <= (0 if factor == 2 else 1e-3)  # of three, in bf16
        consolidate(str(grown), str(stock), uniform=True)
        model = transformers.GPT2LMHeadModel.from_pretrained(stock)
        assert model.config.n_inner == factor * 128
        assert (logits(stock) - logits(grown)).abs().max() < (1e-4 if factor == 2 else 1e-3)


@pytest.mark.parametrize("factor", [3, 4])
def test_stock_of_larger_factors(text_base: Path, factor: int, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), factor=factor)
    consolidate(str(tmp_path / "grown"), str(tmp_path / "stock"), dtype="float32")
    assert (logits(tmp_path / "stock") - logits(tmp_path / "grown")).abs().max() < 1e-3
    width = json.loads((tmp_path / "stock" / "config.json").read_text())["intermediate_size"]
    assert width == factor * TEXT_CONFIG["intermediate_size"]


def test_layers_that_predict_more_tokens_are_passed_over(tmp_path: Path) -> None:
    """Qwen 3.5's files have some, as a model of its own beside the decoder's; classes do not load them."""
    base = make(tmp_path / "base", "qwen3")
    own = load_file(base / "model.safetensors")
    more = {f"mtp.{name.removeprefix('model.')}": tensor for name, tensor in own.items() if ".layers.0." in name}
    save_file({**own, **{name: tensor.clone() for name, tensor in more.items()}}, base / "model.safetensors")
    expand(str(base), str(tmp_path / "grown"))
    assert verify(str(tmp_path / "grown"), str(base))["problems"] == []
    extract_base(str(tmp_path / "grown"), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == folder_checksums(base)


@pytest.mark.parametrize(
    ("name", "layer", "text"),
    [
        ("model.text_model.layers.3.mlp.up_proj.weight", 3, True),  # Idefics3, SmolVLM
        ("model.vision_model.encoder.layers.3.mlp.fc1.weight", None, False),
        ("model.connector.modality_projection.proj.weight", None, False),
        ("model.language_model.layers.3.mlp.up_proj.weight", 3, True),  # Qwen 2.5 VL
        ("model.visual.blocks.3.mlp.up_proj.weight", None, False),
        ("model.image_newline", None, False),  # LLaVA-NeXT
        ("model.language_model.embed_tokens.weight", None, True),
    ],
)
def test_which_parameters_text_does_not_pass(name: str, layer: int | None, text: bool) -> None:
    assert (layer_of(name), of_language_model(name)) == (layer, text)


def test_a_text_longer_than_the_positions_there_are(tmp_path: Path) -> None:
    """`verify --forward` compares what fits."""
    base = make(tmp_path / "base", "gpt2")
    make_tokenizer(base)
    expand(str(base), str(tmp_path / "grown"))
    assert compare_logits(str(tmp_path / "grown"), str(base))["float32"]["difference"] == 0
