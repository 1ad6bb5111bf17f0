"""Copies of another checkpoint's MLPs: the start is the mean of both, α = 0 the base, and it trains like any growth."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from grow.checkpoint.consolidate import consolidate
from grow.checkpoint.expand import expand
from grow.checkpoint.package import extract_base
from grow.checkpoint.switch_record import SwitchRecord
from grow.checkpoint.updates import read_updates
from grow.checkpoint.verify import verify
from grow.errors import UserError
from grow.model.layouts import decoder_mlps
from grow.model.loading import load
from grow.model.switched import put_switch
from tests.checkpoint.test_architectures import make
from tests.helpers.checkpoints import edit_json
from tests.helpers.running import train_and_resume
from tests.helpers.tiny import folder_checksums, grow, logits, make_base, make_recipe


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return make_base(tmp_path / "other", "text", seed=1)


def test_it_starts_at_the_mean_of_both(text_base: Path, other: Path, tmp_path: Path) -> None:
    said = grow("expand", text_base, tmp_path / "grown", "--copies-from", other, "--layers", "1,2").stdout
    assert "written" in said
    models = [load(path, torch.float32) for path in (text_base, other, tmp_path / "grown")]
    mlps = [decoder_mlps(model) for model in models]
    x = torch.randn(3, 32)
    for layer in (1, 2):
        own, others, found = (of[layer](x) for of in mlps)
        assert torch.equal(found, own / 2 + others / 2)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(load(tmp_path / "grown", dtype, 0.0)), logits(load(text_base, dtype)))
    said = grow("verify", tmp_path / "grown", "--base", text_base, "--forward").stdout
    assert "its copies came from other: it starts at the mean of both; at α = 0:" in said
    assert said.count("every logit equal to the base's, bit for bit") == 2
    assert "it computes the mean of both" in (tmp_path / "grown/README.md").read_text()
    extract_base(str(tmp_path / "grown"), str(tmp_path / "again"))
    assert folder_checksums(tmp_path / "again") == folder_checksums(text_base)
    consolidate(str(tmp_path / "grown"), str(tmp_path / "stock"), uniform=True)
    assert (logits(load(tmp_path / "stock", torch.float32)) - logits(models[2])).abs().max() < 1e-4


def test_what_changed_is_told(text_base: Path, other: Path, tmp_path: Path) -> None:
    expand(str(text_base), str(tmp_path / "grown"), copies_from=str(other))
    assert verify(str(tmp_path / "grown"))["problems"] == []
    (shard,) = (tmp_path / "grown").glob("growth-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert any("checksum" in line for line in verify(str(tmp_path / "grown"))["problems"])


def test_it_trains(text_base: Path, other: Path, sums: Path, tmp_path: Path) -> None:
    """What has moved is told from where the copies began."""
    expand(str(text_base), str(tmp_path / "grown"), copies_from=str(other))
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 1, method="g_train")
    assert train_and_resume(recipe, 1)
    updates, _ = read_updates(str(tmp_path / "run"))
    began = {name: p for name, p in load(tmp_path / "grown", torch.float32).named_parameters() if ".grown." in name}
    found = [update for update in updates if update.matrix == "mlp.up_proj" and update.layer == 1]
    starts = [update.before.load().float() for update in found]
    assert any(torch.equal(start, began["model.layers.1.mlp.grown.up_proj.weight"]) for start in starts)
    grow("consolidate", tmp_path / "run", tmp_path / "trained", "--format", "grown")
    assert json.loads((tmp_path / "trained/growth.json").read_text())["copies_from"] == "other"
    assert verify(str(tmp_path / "trained"))["problems"] == []
    # As a package on its base again, with a switch.
    grow("growth", tmp_path / "trained", tmp_path / "package")
    grow("attach", text_base, tmp_path / "package", tmp_path / "again")
    trained, again = (load(path, torch.float32) for path in (tmp_path / "trained", tmp_path / "again"))
    assert torch.equal(logits(again), logits(trained))
    put_switch(again, SwitchRecord("row", 0, np.zeros(32, np.float32), 1.0))
    assert torch.equal(logits(again), logits(load(text_base, torch.float32))), "no row opens it"
    with pytest.raises(UserError, match="its copies came from other; name the run"):
        read_updates(str(tmp_path / "trained"))


def test_what_cannot_stand_in_is_refused(text_base: Path, other: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        expand(str(text_base), out, copies_from=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is missing"):
        expand(str(text_base), out, copies_from=str(make(tmp_path / "gpt2", "gpt2")))
    with pytest.raises(UserError, match=r"is \[64, 32\]"):
        expand(
            str(text_base),
            out,
            copies_from=str(make(tmp_path / "wide", "llama", num_hidden_layers=4, intermediate_size=64)),
        )
    expand(str(text_base), str(tmp_path / "grown"))
    with pytest.raises(UserError, match="is grown; give a stock checkpoint"):
        expand(str(text_base), out, copies_from=str(tmp_path / "grown"))
    assert not Path(out).exists()
    said = grow("expand", text_base, tmp_path / "grown", "--keep", "--copies-from", other, code=2).stderr
    assert "with copies from its base, not from other" in said


def test_another_activation_and_another_factor(text_base: Path, other: Path, tmp_path: Path) -> None:
    """An MLP that computes otherwise is refused; by a factor of 3 two thirds of the start are the other's."""
    expand(str(text_base), str(tmp_path / "three"), copies_from=str(other), factor=3)
    said = grow("verify", tmp_path / "three").stdout
    assert "it starts at the base's 1/3 and 2/3 of the other" in said
    assert "it computes the base's 1/3 and 2/3" in (tmp_path / "three/README.md").read_text()
    edit_json(other / "config.json", hidden_activation="relu")
    with pytest.raises(UserError, match="the activation of its MLPs is relu, the base's is gelu"):
        expand(str(text_base), str(tmp_path / "no"), copies_from=str(other))
