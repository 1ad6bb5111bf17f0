"""Several skills on one base: each comes out as it went in, and computes what it does alone where it alone is on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import grow
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.switch_record import SwitchRecord
from grow.checkpoint.verify import verify
from grow.evaluation.evaluate import evaluate
from grow.methods import read_recipe
from grow.model.layouts import decoder_mlps
from grow.model.loading import load
from grow.model.switched import put_switch
from grow.names import is_growth, skill_of
from tests.helpers.running import here
from tests.helpers.tiny import file_checksum, folder_checksums, logits, make_base, make_recipe

PROMPTS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(3))


def skill(base: Path, out: Path, seed: int, layers: str, method: str, feature: int | None, heads: str = "") -> None:
    """A growth package, trained by chance; with a switch that is on for half of the prompts. `heads`: the layers whose
    query heads grow."""
    how = {"attention": "queries", "attention_layers": heads} if heads else {}
    model = grow.grow_model(load(base), layers=layers, **how)
    generator = torch.Generator().manual_seed(seed)
    for parameter in grow.trainable(model, method):
        if seed:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).bfloat16()
    if feature is not None:
        seen: list[torch.Tensor] = []
        handle = decoder_mlps(model)[1].register_forward_pre_hook(lambda _, x: seen.append(x[0][:, -1].float()))
        logits(load(base), input_ids=PROMPTS)
        logits(model, input_ids=PROMPTS)
        handle.remove()
        weight = torch.zeros(32)
        weight[feature] = 1.0
        record = SwitchRecord("row", 1, weight.numpy(), float(seen[0][:, feature].median()), facts={})
        put_switch(model, record)
        model.config.growth["switch"] = record.values()
    grow.save_growth(model, out)


@pytest.fixture(scope="module", params=["MLPs", "query heads"])
def world(text_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Two skills with switches, of other layers, methods and features; and all of it on one base."""
    path = tmp_path_factory.mktemp("skills")
    growths = [("1-3", ""), ("2,3", "")] if request.param == "MLPs" else [("none", "2,3"), ("3", "2,3")]
    skill(text_base, path / "french", 1, growths[0][0], "g_freeze", 3, growths[0][1])
    skill(text_base, path / "sums", 2, growths[1][0], "g_train", 7, growths[1][1])
    words = ["attach", str(text_base), str(path / "french"), f"logic={path / 'sums'}", str(path / "both")]
    from grow.cli.main import main

    assert main(words) == 0
    for name in ("french", "sums"):
        assert main(["attach", str(text_base), str(path / name), str(path / f"{name}-alone")]) == 0
    return path


def test_what_is_on_disk(world: Path, text_base: Path, tmp_path: Path, capsys: Any) -> None:
    config = json.loads((world / "both" / "config.json").read_text())
    assert config["growth"]["format_version"] == 2 and list(config["growth"]["skills"]) == ["french", "logic"]
    assert {skill_of(name) for name in Checkpoint(world / "both").tensors if is_growth(name)} == {"french", "logic"}
    assert "french" in (world / "both" / "README.md").read_text()
    here(capsys, "verify", world / "both", "--base", text_base)
    here(capsys, "base", world / "both", tmp_path / "base")
    assert file_checksum(tmp_path / "base" / "model.safetensors") == file_checksum(text_base / "model.safetensors")
    for name, package in (("french", "french"), ("logic", "sums")):
        here(capsys, "growth", world / "both", tmp_path / name, "--name", name)
        out, into = (
            Checkpoint.of_files(p, sorted(p.glob("*.safetensors"))) for p in (tmp_path / name, world / package)
        )
        assert out.tensors.keys() == into.tensors.keys()
        assert all(torch.equal(out.read(key), into.read(key)) for key in into.tensors)
        here(capsys, "attach", text_base, tmp_path / name, tmp_path / f"{name}-again")
        again = folder_checksums(tmp_path / f"{name}-again")
        assert again == folder_checksums(world / f"{package}-alone"), "as if it had never been beside another"
    shard = next((world / "both").glob("growth-*"))
    whole = shard.read_bytes()
    try:
        shard.unlink()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert any("changed since it was written" in line for line in verify(str(world / "both"))["problems"])
    finally:
        shard.write_bytes(whole)


def test_each_opens_on_its_own(world: Path, text_base: Path) -> None:
    """Where one alone is on, it is what it is alone; where none is, the base; where both are, the sum."""
    base, both = load(text_base), load(world / "both")
    french, sums = load(world / "french-alone"), load(world / "sums-alone")
    expected, found = logits(base, input_ids=PROMPTS), logits(both, input_ids=PROMPTS)
    decided = both.switched
    alone = {"french": logits(french, input_ids=PROMPTS), "logic": logits(sums, input_ids=PROMPTS)}
    assert torch.equal(decided["french"], french.switched) and torch.equal(decided["logic"], sums.switched)
    none = ~decided["french"] & ~decided["logic"]
    two = decided["french"] & decided["logic"]
    assert none.any() and two.any() and (decided["french"] & ~two).any() and (decided["logic"] & ~two).any()
    assert torch.equal(found[none], expected[none])
    for name in ("french", "logic"):
        one = decided[name] & ~two
        assert torch.allclose(found[one].float(), alone[name][one].float(), atol=0.2)
        model = french if name == "french" else sums
        assert torch.equal(logits(both, input_ids=PROMPTS[one]), logits(model, input_ids=PROMPTS[one]))
    assert not any(torch.allclose(found[two].float(), other[two].float(), atol=0.2) for other in alone.values())
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    written = both.generate(PROMPTS, **options)
    assert both.switched["french"].shape == (8,)
    assert torch.equal(written[none], base.generate(PROMPTS, **options)[none])
    grow.set_switch(both, "off")
    assert torch.equal(logits(both, input_ids=PROMPTS), expected)
    grow.set_switch(both, "auto")
    grow.set_alpha(both, 0)
    assert torch.equal(logits(both, input_ids=PROMPTS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_of_each(text_base: Path, tmp_path: Path, capsys: Any, dtype: torch.dtype) -> None:
    """Skills that have not been trained leave the base's bits, all on together; one that has is what it is alone."""
    for seed, name, layers in ((0, "one", "all"), (0, "two", "1-3"), (5, "three", "all")):
        skill(text_base, tmp_path / name, seed, layers, "g_freeze", None)
    here(capsys, "attach", text_base, tmp_path / "one", tmp_path / "two", tmp_path / "fresh")
    base = load(text_base, dtype)
    assert torch.equal(logits(load(tmp_path / "fresh", dtype)), logits(base))
    here(capsys, "attach", text_base, tmp_path / "three", tmp_path / "two", tmp_path / "mixed")
    here(capsys, "attach", text_base, tmp_path / "three", tmp_path / "alone")
    found, alone = logits(load(tmp_path / "mixed", dtype)), logits(load(tmp_path / "alone", dtype))
    assert torch.allclose(found.float(), alone.float(), atol=0.3 if dtype == torch.bfloat16 else 1e-3)
    here(capsys, "attach", text_base, tmp_path / "three", tmp_path / "two", tmp_path / "half", "--alpha", "three=0.5")
    half, reference = load(tmp_path / "half", dtype), load(tmp_path / "alone", dtype, alpha=0.5)
    atol = 0.3 if dtype == torch.bfloat16 else 1e-3
    assert torch.allclose(logits(half).float(), logits(reference).float(), atol=atol)


@pytest.mark.parametrize(("alpha", "own"), [("1", ""), ("0.5", ""), ("0", ""), ("1", "french=0.5")])
def test_the_stock_form(world: Path, text_base: Path, tmp_path: Path, capsys: Any, alpha: str, own: str) -> None:
    """All on, joined: what the skills compute together, with both kinds of growth, and where one has an α of its own; α
    = 0 is the base."""
    out, start = tmp_path / "stock", world / "both"
    if own:
        start = tmp_path / "both"
        here(capsys, "attach", text_base, world / "french", f"logic={world / 'sums'}", start, "--alpha", own)
    here(capsys, "consolidate", start, out, "--uniform", "--without-switch", "--alpha", alpha,
         "--dtype", "float32")  # fmt: skip
    both = load(start, torch.float32, float(alpha))
    grow.set_switch(both, "on")
    found = logits(load(out), input_ids=PROMPTS)
    assert torch.allclose(found, logits(both, input_ids=PROMPTS), atol=2e-3)
    if alpha == "0":
        assert torch.allclose(found, logits(load(text_base, torch.float32), input_ids=PROMPTS), atol=2e-3)


def test_a_broken_one_is_one_line(world: Path, tmp_path: Path, capsys: Any) -> None:
    """A skill whose config speaks of other layers than its tensors."""
    broken = tmp_path / "broken"
    shutil.copytree(world / "both", broken)
    config = json.loads((broken / "config.json").read_text())
    config["growth"]["skills"]["french"]["layers"] = [0, 1, 2, 3]
    (broken / "config.json").write_text(json.dumps(config))
    line = here(capsys, "consolidate", broken, tmp_path / "stock", "--uniform", "--without-switch", code=2)
    assert "is in the plan but not in the checkpoint" in line and not (tmp_path / "stock").exists()


def test_scores(world: Path, text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1)
    found = evaluate(str(world / "both"), read_recipe(str(recipe)), (0.0, 1.0), limit=6)
    assert found["by_alpha"][0]["task"]["identical"] == 1 and 0 <= found["task"]["opened"] <= 1
    assert found["task"]["opened"] == 1 - found["task"]["identical"]


def test_mistakes(world: Path, text_base: Path, tmp_path: Path, capsys: Any) -> None:
    french, sums, out = world / "french", world / "sums", tmp_path / "out"
    assert "two skills are called french" in here(capsys, "attach", text_base, french, french, out, code=2)
    assert "are the same growth" in here(capsys, "attach", text_base, f"a={french}", f"b={french}", out, code=2)
    assert "no growth there" in here(capsys, "attach", text_base, french, text_base, out, code=2)
    assert "no name of a skill" in here(capsys, "attach", text_base, f"a b={french}", sums, out, code=2)
    assert "there is no such skill" in here(capsys, "attach", text_base, french, sums, out, "--alpha", "x=1", code=2)
    assert "between 0" in here(capsys, "attach", text_base, french, sums, out, "--alpha", "sums=2", code=2)
    assert "NAME=ALPHA" in here(capsys, "attach", text_base, french, sums, out, "--alpha", "sums", code=2)
    assert "several skills" in here(capsys, "attach", text_base, french, out, "--alpha", "french=1", code=2)
    assert "are needed" in here(capsys, "attach", text_base, french, code=2)
    other = make_base(tmp_path / "other", "text", seed=1)
    assert "checksum" in here(capsys, "attach", other, french, sums, out, code=2)
    assert "no such skill" in here(capsys, "growth", world / "both", out, "--name", "german", code=2)
    assert "leave --name out" in here(capsys, "growth", world / "french-alone", out, "--name", "french", code=2)
    assert "--without-switch" in here(capsys, "consolidate", world / "both", out, code=2)
    assert "--uniform" in here(capsys, "consolidate", world / "both", out, "--without-switch", code=2)
    assert "french, logic" in here(capsys, "consolidate", world / "both", out, "--format", "grown", code=2)
    assert "french, logic" in here(capsys, "growth", world / "both", out, code=2)
    assert not out.exists() and not list(tmp_path.glob("out*"))
