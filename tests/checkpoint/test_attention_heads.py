"""Heads of attention that have grown: exact at step 0, with a KV cache too; trained and resumed; their stock form."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import grow
from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth
from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.evaluation.find_alpha import _next
from grow.methods import read_recipe
from grow.model.alpha import base_inside, set_alpha
from grow.model.grown import grown_parts
from grow.model.loading import load
from grow.training.check import check_run
from tests.checkpoint.test_architectures import make
from tests.helpers.running import consolidate as consolidate_run
from tests.helpers.running import here, train_and_resume
from tests.helpers.tiny import TEXT_CONFIG, folder_checksums, logits, make_base, make_recipe, tokens, written_scores

SHARING = ("gemma4", "gemma4-values", "gemma3n")
"""Layers share keys and values, and have heads of two sizes; or values that are the keys."""
CASES = [
    *((kind, heads) for heads in ("queries", "heads") for kind in ("text", "multimodal", "llama", "qwen3")),
    *((kind, "queries") for kind in SHARING),
    *(pytest.param(kind, heads, marks=pytest.mark.full)
      for heads in ("queries", "heads") for kind in ("gemma2", "mistral", "qwen2")),
]  # fmt: skip


GENERATE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
WRITING: list[dict[str, Any]] = [
    {}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"use_cache": False},
]  # fmt: skip


def padded() -> dict[str, torch.Tensor]:
    """Two prompts, one of them padded on the left; with what follows longer than a sliding window."""
    ids, mask = tokens(11).repeat(2, 1), torch.ones(2, 11, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = 256, 0
    return {"input_ids": ids, "attention_mask": mask}


def base_of(folder: Path, text_base: Path, kind: str) -> Path:
    """Gemma 3's has one head of keys, the others two, each for two query heads."""
    if kind == "text":
        return text_base
    if kind == "multimodal":
        return make_base(folder / "base", kind)
    how: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind.startswith("gemma4"):
        how |= {"global_head_dim": 32, "sliding_window": 6}
    if kind == "gemma4-values":  # as in the 31B
        how |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
    return make(folder / "base", kind.removesuffix("-values"), **how)


def move(grown: Path) -> None:
    """Moves all that was added far."""
    (file,) = grown.glob("growth-*.safetensors")
    generator, tensors = torch.Generator().manual_seed(0), load_file(file)
    for name, tensor in tensors.items():
        noise = 0.5 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        tensors[name] = tensor + noise.to(tensor.dtype)
    file.unlink()
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "heads"), CASES)
def test_it_starts_as_its_base(text_base: Path, tmp_path: Path, kind: str, heads: str, dtype: torch.dtype) -> None:
    """All logits are equal: in a pass, in packed rows, token by token with a KV cache; and once moved, at α = 0."""
    base = base_of(tmp_path, text_base, kind)
    expand(str(base), str(tmp_path / "grown"), layers="none", attention=heads)
    assert verify(str(tmp_path / "grown"), str(base))["problems"] == []
    models = [load(path, dtype).requires_grad_(False) for path in (base, tmp_path / "grown")]
    assert len(list(grown_parts(models[1]))) == models[1].config.get_text_config().num_hidden_layers
    packed = {"input_ids": tokens(24), "position_ids": torch.cat((torch.arange(10), torch.arange(14)))[None]}
    for inputs in ({"input_ids": tokens(20)}, packed | {"use_cache": False}):
        assert torch.equal(*(model(**inputs).logits for model in models))
    assert torch.equal(*map(written_scores, models))
    for part in grown_parts(models[1]):
        part.grown.o_proj.weight.data.mul_(2)
    assert not torch.equal(*(model(tokens(20)).logits for model in models))
    with base_inside(models[1]):
        assert torch.equal(*(model(tokens(20)).logits for model in models))


@pytest.mark.parametrize(("kind", "heads"), CASES)
def test_its_stock_form(text_base: Path, tmp_path: Path, kind: str, heads: str) -> None:
    """Of some layers, padded; at α = 0.5 too; with a cache and without, as the grown model computes."""
    base = base_of(tmp_path, text_base, kind)
    mlps = "1" if kind == "gemma3n" else "0"  # the first keeps its largest neurons alone
    expand(str(base), str(tmp_path / "start"), layers=mlps, attention=heads, attention_layers="1-2")
    move(tmp_path / "start")
    model = load(tmp_path / "start", torch.float32)
    for alpha in (1.0, 0.5):
        out = tmp_path / f"stock-{alpha}"
        with pytest.raises(UserError, match="--uniform"):
            consolidate(str(tmp_path / "start"), str(out), alpha=alpha)
        consolidate(str(tmp_path / "start"), str(out), alpha=alpha, uniform=True, dtype="float32")
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        after, before = (one.config.get_text_config().to_dict() for one in (stock, load(base)))
        assert after["num_attention_heads"] == 2 * before["num_attention_heads"]
        assert after["num_key_value_heads"] == (2 if heads == "heads" else 1) * before["num_key_value_heads"]
        set_alpha(model, alpha)
        assert torch.allclose(logits(stock), logits(model), atol=1e-4)
        for how in WRITING:
            ids = [one.generate(**padded(), **GENERATE, **how) for one in (stock, model)]
            assert torch.equal(*ids), how


@pytest.mark.parametrize(("method", "heads"), [("g_freeze", "queries"), ("g_train", "queries"), ("g_train", "heads")])
def test_it_trains(
    text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture, method: str, heads: str
) -> None:
    """A run resumes in the same bits; its growth, on the base again, computes the same; the base comes out of it."""
    expand(str(text_base), str(tmp_path / "grown"), layers="none", attention=heads)
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, method=method)
    weights = train_and_resume(recipe, 1)
    up = ["q_proj"] if heads == "queries" else ["q_proj", "k_proj", "v_proj"]
    names = {f"self_attn.grown.{name}" for name in (*up, "o_proj")}
    names |= {f"self_attn.trained.{name}" for name in up} if method == "g_train" else set()
    assert {name.split(".", 3)[3].removesuffix(".weight") for name in weights} == names
    run = tmp_path / "run"
    consolidate_run(str(run), str(tmp_path / "still"), "grown")
    assert verify(str(tmp_path / "still"), str(text_base))["problems"] == []
    extract_growth(str(tmp_path / "still"), str(tmp_path / "package"))
    attach_growth(str(text_base), str(tmp_path / "package"), str(tmp_path / "again"))
    expected = logits(load(tmp_path / "still", torch.float32))
    assert torch.equal(logits(load(tmp_path / "again", torch.float32)), expected)
    assert not torch.equal(expected, logits(load(text_base, torch.float32)))
    consolidate_run(str(run), str(tmp_path / "stock"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert torch.allclose(logits(stock), expected, atol=1e-3)
    extract_base(str(tmp_path / "still"), str(tmp_path / "base"))
    assert folder_checksums(tmp_path / "base") == folder_checksums(text_base)
    words = {"queries": "query heads", "heads": "heads"}[heads]
    assert f"the {words} of 4 layers (0-3)" in here(capsys, "plan", text_base, "--attention", heads)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "heads"), [(1, "queries"), (2, "heads"), (3, "queries"), (3, "heads")])
def test_it_trains_on_two_ranks(text_base: Path, sums: Path, tmp_path: Path, stage: int, heads: str) -> None:
    """With MLPs of one layer grown beside."""
    expand(str(text_base), str(tmp_path / "grown"), layers="1", attention=heads, attention_layers="0,3")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, stage, method="g_train")
    weights = train_and_resume(recipe, 2)
    assert len(weights) == 2 * (3 if heads == "queries" else 7) + 5


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such part": ({"attention": "keys"}, "there are queries and heads"),
    "a factor": ({"attention": "queries", "factor": 4}, "a factor of 2 alone"),
    "layers of nothing": ({"attention_layers": "1"}, "with --attention queries or heads"),
    "layers that are no layers": ({"attention": "queries", "attention_layers": "x"}, "--attention-layers x: 'x' is"),
    "a layer that is not there": ({"attention": "queries", "attention_layers": "9"}, "--attention-layers 9: layer 9"),
    "copies of others": ({"attention": "queries", "copies_from": "."}, "copies MLPs of the language model alone"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(text_base: Path, tmp_path: Path, mistake: str) -> None:
    how, expected = MISTAKES[mistake]
    if "copies_from" in how:
        how = how | {"copies_from": str(text_base)}
    with pytest.raises(UserError, match=expected):
        expand(str(text_base), str(tmp_path / "grown"), **how)
    assert not (tmp_path / "grown").exists()


def test_where_it_cannot_be(text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    phi = make(tmp_path / "phi", "phi")
    said = here(capsys, "expand", phi, tmp_path / "no", "--attention", "queries", code=2)
    assert "the attention of phi is not known here" in said
    here(capsys, "expand", text_base, tmp_path / "grown", "--attention", "heads")
    here(capsys, "growth", tmp_path / "grown", tmp_path / "package")
    said = here(
        capsys, "attach", text_base, f"a={tmp_path / 'package'}", f"b={tmp_path / 'package'}", tmp_path / "x", code=2
    )
    assert "query heads can" in said


@pytest.mark.parametrize("heads", ["queries", "heads"])
def test_in_memory(text_base: Path, tmp_path: Path, heads: str) -> None:
    """Grown and trained in a loop of one's own; the package on a loaded base; a stock checkpoint, at α = 0.5 too."""
    model: Any = AutoModelForCausalLM.from_pretrained(text_base, dtype=torch.float32)
    before = logits(model)
    grow.grow_model(model, layers="1,2", attention=heads)
    assert torch.equal(logits(model), before)
    generator = torch.Generator().manual_seed(0)
    for parameter in grow.trainable(model, "g_train"):
        parameter.data += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    grow.save_growth(model, tmp_path / "package")
    other = grow.attach(AutoModelForCausalLM.from_pretrained(text_base, dtype=torch.float32), tmp_path / "package")
    assert torch.equal(logits(other), logits(model)) and not torch.equal(logits(model), before)
    for alpha in (1.0, 0.5, 0.0):
        grow.set_alpha(model, alpha)
        grow.to_stock(model, tmp_path / f"stock-{alpha}", uniform=True)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / f"stock-{alpha}", dtype=torch.float32)
        assert torch.allclose(logits(stock), logits(model), atol=1e-4)
    assert torch.equal(logits(model), before)


def test_g_lora(text_base: Path, sums: Path, tmp_path: Path) -> None:
    """A low-rank update of the copied heads."""
    expand(str(text_base), str(tmp_path / "grown"), layers="none", attention="queries")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, method="g_lora", lora_rank=2)
    weights = train_and_resume(recipe, 1)
    assert len(weights) == 4 * 2 * 2 and all(".self_attn.grown." in name for name in weights)
    consolidate_run(str(tmp_path / "run"), str(tmp_path / "still"), "grown")
    assert verify(str(tmp_path / "still"), str(text_base))["problems"] == []
    recipe = make_recipe(
        tmp_path / "s.yaml", text_base, tmp_path / "grown", sums, 1, method="g_lora", lora_targets=["gate_proj"]
    )
    with pytest.raises(UserError, match="gate_proj"):
        check_run(read_recipe(str(recipe)))


def test_a_config_that_leaves_out_what_is_usual(tmp_path: Path) -> None:
    """As the 4B's on the hub, whose class has these numbers of heads by itself."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    base, model = tmp_path / "base", Gemma3ForCausalLM(Gemma3TextConfig(**TEXT_CONFIG | heads))
    model.to(torch.bfloat16).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in heads}))
    for kind in ("queries", "heads"):
        grown, stock = tmp_path / kind, tmp_path / f"{kind}-stock"
        expand(str(base), str(grown), layers="none", attention=kind)
        move(grown)
        consolidate(str(grown), str(stock), dtype="float32")
        assert torch.allclose(logits(load(stock)), logits(load(grown, torch.float32)), atol=1e-4)
    gemma2 = make(tmp_path / "gemma2", "gemma2")  # nothing else tells
    config = json.loads((gemma2 / "config.json").read_text())
    (gemma2 / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in heads}))
    with pytest.raises(UserError, match="no head_dim and num_attention_heads"):
        expand(str(gemma2), str(tmp_path / "no"), layers="none", attention="queries")


def test_dropout_sleeps_with_the_model(tmp_path: Path) -> None:
    """Heads that are added to a model in eval mode are in it too."""
    model = load(make(tmp_path / "base", "llama", attention_dropout=0.5))
    before = logits(model)
    assert torch.equal(logits(grow.grow_model(model, [], attention="heads", attention_layers=[0, 2])), before)
    assert len(list(grown_parts(model))) == 2


def test_alpha_may_change_while_a_cache_is_kept(text_base: Path, tmp_path: Path) -> None:
    """A KV cache holds both branches' keys, whatever α is; what goes round it is refused."""
    expand(str(text_base), str(tmp_path / "grown"), layers="none", attention="heads")
    move(tmp_path / "grown")
    model: Any = load(tmp_path / "grown", torch.float32).requires_grad_(False)
    expected = model(tokens(12), use_cache=False).logits[:, 8:]
    set_alpha(model, 0)
    cache = model(tokens(12)[:, :8]).past_key_values
    set_alpha(model, 1)
    assert model(tokens(12)[:, 8:], past_key_values=cache).logits.shape == expected.shape
    with pytest.raises(UserError, match="use generate"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 32), cache=object())


def test_the_command_that_comes_next(text_base: Path, tmp_path: Path) -> None:
    """As find-alpha names it."""
    expand(str(text_base), str(tmp_path / "grown"), layers="all", attention="queries", attention_layers="1")
    model = load(tmp_path / "grown")
    assert "--uniform" in _next(SimpleNamespace(model=model), "run", "")  # type: ignore[arg-type]


def test_where_stock_heads_would_be_scaled_wrongly(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """llama.cpp takes a Gemma 3 of 62 layers for a 27B, and the scale of its attention from the number of heads."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**(TEXT_CONFIG | {"num_hidden_layers": 62, "num_attention_heads": 2}))
    big = tmp_path / "27b"
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(big)
    for name, base, heads in (("heads", big, "queries"), ("mlps", big, ""), ("small", text_base, "queries")):
        expand(str(base), str(tmp_path / name), layers="none" if heads else "all", attention=heads)
    wrong = here(capsys, "consolidate", tmp_path / "heads", tmp_path / "no", "--for", "llama.cpp", code=2)
    assert "llama.cpp scales the attention of a 27B by hidden_size ÷ num_attention_heads" in wrong
    assert not (tmp_path / "no").exists()
    for name, program in (("heads", "vllm"), ("mlps", "llama.cpp"), ("small", "llama.cpp")):
        said = here(capsys, "consolidate", tmp_path / name, tmp_path / f"{name}-{program}", "--for", program)
        assert len(said.splitlines()) == 1, "tried there"
    assert "there are llama.cpp and vllm" in here(
        capsys, "consolidate", tmp_path / "small", tmp_path / "no", "--for", "ollama", code=2
    )
