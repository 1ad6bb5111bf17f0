"""The input embedding, trained with its base kept; its head is tied to it or has a matrix of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import grow
from grow.checkpoint.expand import expand
from grow.checkpoint.package import attach_growth, extract_base, extract_growth
from grow.checkpoint.switch_record import SwitchRecord
from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.model.alpha import set_alpha
from grow.model.layouts import decoder_mlps
from grow.model.loading import load
from grow.model.switched import put_switch
from grow.parts import FIELDS, PARTS
from tests.checkpoint.test_architectures import make
from tests.checkpoint.test_attention_heads import move
from tests.helpers.running import consolidate, here, train_and_resume
from tests.helpers.tiny import folder_checksums, logits, make_base, make_recipe, tokens, written_scores

PROMPTS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(3))


def base_of(folder: Path, text_base: Path, kind: str) -> Path:
    """Gemma 3, whose embedding scales, or its multimodal class; GPT-2; and Llama, whose head is not tied."""
    if kind == "gemma3":
        return text_base
    return make_base(folder, kind) if kind == "multimodal" else make(folder / "base", kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma3", "multimodal", "gpt2", "llama"])
def test_it_starts_as_its_base(text_base: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """All logits are equal; and once moved, at α = 0. The base comes out again, by checksum."""
    base, grown = base_of(tmp_path / "base", text_base, kind), tmp_path / "grown"
    expand(str(base), str(grown), train_embedding=True)
    assert verify(str(grown), str(base))["problems"] == []
    before = logits(load(base, dtype))
    assert torch.equal(logits(load(grown, dtype)), before)
    assert torch.equal(*(written_scores(load(path, dtype)) for path in (grown, base)))
    move(grown)
    assert not torch.equal(logits(load(grown, dtype)), before)
    assert torch.equal(logits(load(grown, dtype, alpha=0)), before)
    extract_base(str(grown), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == folder_checksums(base)


@pytest.mark.parametrize("kind", ["gemma3", "multimodal", "gpt2", "llama"])
def test_its_stock_form(text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    """The head stays the base's, beside an embedding that is not; MLPs have grown too. llama.cpp would not use it."""
    base, grown = base_of(tmp_path / "base", text_base, kind), tmp_path / "grown"
    expand(str(base), str(grown), layers="all", train_embedding=True)
    move(grown)
    model: Any = load(grown, torch.float32)
    for alpha in (1.0, 0.5):
        out = tmp_path / f"stock-{alpha}"
        here(capsys, "consolidate", grown, out, "--alpha", str(alpha), "--dtype", "float32")
        stock = type(load(base)).from_pretrained(out, dtype=torch.float32).eval()
        assert not torch.equal(stock.get_input_embeddings().weight, stock.get_output_embeddings().weight)
        set_alpha(model, alpha)
        assert torch.allclose(logits(stock), logits(model), atol=1e-3)
    if kind == "gemma3":
        said = here(capsys, "consolidate", grown, tmp_path / "no", "--for", "llama.cpp", code=2)
        assert "takes a Gemma's embedding for its head" in said


@pytest.mark.parametrize(
    ("stage", "ranks"), [(1, 1), (3, 1), *(pytest.param(stage, 2, marks=pytest.mark.full) for stage in (2, 3))]
)
def test_it_trains(
    text_base: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture, stage: int, ranks: int
) -> None:
    """By a recipe that asks for it, under any stage, and resumes in the same bits."""
    said = here(capsys, "expand", text_base, tmp_path / "grown", "--train-embedding")
    assert "grown: the input embedding\n" in said
    asked = {"layers": "none", "train_embedding": True}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, stage, **asked)
    assert list(train_and_resume(recipe, ranks)) == ["model.embed_tokens.grown.weight"]
    run = tmp_path / "run"
    consolidate(str(run), str(tmp_path / "still"), "grown")
    expected = logits(load(tmp_path / "still", torch.float32))
    assert not torch.equal(expected, logits(load(text_base, torch.float32)))
    extract_growth(str(run), str(tmp_path / "package"))
    attach_growth(str(text_base), str(tmp_path / "package"), str(tmp_path / "again"))
    assert torch.equal(logits(load(tmp_path / "again", torch.float32)), expected)
    consolidate(str(run), str(tmp_path / "stock"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert torch.allclose(logits(stock), expected, atol=1e-2)


def test_a_switch(text_base: Path) -> None:
    """Rows for which it is off are the base's, bit for bit; the others are as without a switch."""
    model: Any = grow.grow_model(load(text_base), "none", train_embedding=True)
    (copy,) = grow.trainable(model)
    copy.data.mul_(1.5)
    base, always = logits(load(text_base), input_ids=PROMPTS), logits(model, input_ids=PROMPTS)
    seen: list[torch.Tensor] = []
    plain = load(text_base)
    decoder_mlps(plain)[1].register_forward_pre_hook(lambda _, x: seen.append(x[0][:, -1].float()))
    logits(plain, input_ids=PROMPTS)
    weight = torch.zeros(32)
    weight[3] = 1.0
    put_switch(model, SwitchRecord("row", 1, weight.numpy(), float(seen[0][:, 3].median()), facts={}))
    found = logits(model, input_ids=PROMPTS)
    on = model.switched
    assert 0 < on.sum() < len(PROMPTS)
    assert torch.equal(found[~on], base[~on]) and torch.equal(found[on], always[on])
    assert not torch.equal(always[~on], base[~on])
    grow.set_switch(model, "off")
    assert torch.equal(logits(model, input_ids=PROMPTS), base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "g_lora"}, "g_lora: has no LoRA for a copy of the embedding"),
        ({"grown_matrices": "up_proj"}, "grown_matrices: what grows is one matrix"),
        ({"attention_layers": "1"}, "--attention-layers: says where, with --attention queries or heads"),
    ],
)
def test_mistakes(text_base: Path, sums: Path, tmp_path: Path, capsys: Any, fields: dict, message: str) -> None:
    asked = {"layers": "none", "train_embedding": True, **fields}
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "run" / "grown", sums, 1, **asked)
    assert message in here(capsys, "train", recipe, "--check", code=2)


def test_flags_that_are_on_or_off(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """A switch may be said outright, a field of a recipe be given alone; help has no flags that are refused."""
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "run" / "grown", sums, 1)
    grown = "grown: the MLPs of 4 layers (0-3), 2 times as wide"
    assert grown in here(capsys, "plan", recipe, "--train-embedding=false")
    assert "grown: the input embedding\n" in here(capsys, "plan", recipe, "--train_embedding")
    assert "true" in here(capsys, "show", recipe, "train_embedding", "--train-embedding").lower()
    assert "learning_rate: " in here(capsys, "show", recipe, "--train_embedding", "--seed=1")
    assert "but true or false" in here(capsys, "plan", recipe, "--train-embedding=maybe", code=2)
    assert "-f, --factor" not in here(capsys, "expand", "--help")


def test_what_is_left_of_an_earlier_recipe(text_base: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """The run's own grown checkpoint has an embedding, of which the recipe says nothing any more."""
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "run" / "grown", sums, 1)
    here(capsys, "train", recipe, "--check", "--expand", "--train_embedding")
    assert "has grown otherwise than" in here(capsys, "train", recipe, "--check", code=2)
    here(capsys, "train", recipe, "--check", "--train_embedding")


def test_the_table_of_parts() -> None:
    """No two fields have one name, and of what has units, names say which tensors are of the last matrix."""
    from grow.names import ATTENTION, DOWN, MATRICES, OUTPUT, matrix_of

    assert sum(len(part.fields) for part in PARTS.values()) == len(FIELDS)
    for part in PARTS.values():
        layouts = [] if part.made_of == "matrix" else [layout for kind in part.kinds for layout in part.layouts(kind)]
        for *up, down in ([matrix_of(f"{name}.weight") for name in layout] for layout in layouts):
            assert down in (*DOWN, OUTPUT) and {*up, down} <= {*MATRICES, *ATTENTION["heads"]}


def test_a_model_in_memory(text_base: Path, tmp_path: Path) -> None:
    model: Any = grow.grow_model(load(text_base, torch.float32), "none", train_embedding=True)
    (copy,) = grow.trainable(model)
    copy.data.mul_(1.5)
    grow.save_growth(model, tmp_path / "saved")
    other = grow.attach(load(text_base, torch.float32), tmp_path / "saved")
    assert torch.equal(other(tokens(20)).logits, model(tokens(20)).logits)
    both = grow.grow_model(load(text_base), 1, train_embedding=True)
    assert sum("grown" in name for name, _ in both.named_parameters()) == 3 + 1
    with pytest.raises(UserError, match="train_embeddings is not a part; did you mean train_embedding"):
        grow.grow_model(load(text_base), train_embeddings=True)
