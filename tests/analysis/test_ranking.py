"""How much a run has moved each layer, and in how many directions: against matrices of which that is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grow.analysis import ranking
from grow.analysis.effective_rank import rounding_norm, singular_values, spectrum
from grow.checkpoint.expand import expand
from grow.checkpoint.lazy import from_tensor
from grow.data.of_recipe import rows_of, template_of
from grow.errors import UserError
from grow.model.layouts import decoder_mlps
from grow.model.loading import load
from tests.cli.test_command_line import mistake
from tests.helpers.checkpoints import write_base
from tests.helpers.running import train
from tests.helpers.tiny import grow, make_recipe

HIDDEN, WIDTH = 24, 40


def moved(base: Path, out: Path, by: dict[str, torch.Tensor]) -> Path:
    """A stock checkpoint in fp32 whose tensors differ from the base's by these."""
    out.mkdir()
    for file in base.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    for shard in out.glob("*.safetensors"):
        tensors = {name: tensor.float() for name, tensor in load_file(shard).items()}
        save_file({name: tensor + by.get(name, 0) for name, tensor in tensors.items()}, shard)
    return out


def matrix(norm: float, rank: int, seed: int, shape: tuple[int, int]) -> torch.Tensor:
    """Of so many equal singular values, and of this Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator))
    return left @ right.T * norm / math.sqrt(rank)


def name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.{projection}_proj.weight"


def test_layers_where_attention_alone_moved_have_no_place() -> None:
    norms = {2: {"mlp.up_proj": (1.0, 2.0), "self_attn.q_proj": (1.0, 2.0)}, 0: {"self_attn.q_proj": (3.0, 2.0)}}
    assert [row["layer"] for row in ranking.rank([norms], 3)] == [2]
    with pytest.raises(UserError, match="no matrix of an MLP"):
        ranking.rank([{0: norms[0]}], 3)


def test_layers_by_the_size_of_their_update(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", layers=3, hidden=HIDDEN, width=WIDTH)
    sizes = {0: (3.0, 4.0, 12.0), 1: (1.0, 2.0, 2.0), 2: (30.0, 40.0, 0.0)}  # together 13, 3, 50
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    for seed in (0, 1):
        by = {
            name(layer, part): matrix(norm * (1 + seed), 2, seed, shapes[part])
            for layer, norms in sizes.items()
            for part, norm in zip(shapes, norms, strict=True)
        }
        moved(base, tmp_path / f"seed{seed}", by)
    said = grow("rank", tmp_path / "seed0", "--start", base, "--out", tmp_path / "one").stdout
    assert "| 1 | 2 | 50 |" in said and (tmp_path / "one" / "ranking.png").stat().st_size > 1000
    one = json.loads((tmp_path / "one" / "ranking.json").read_text())
    assert one["layers"] == [2, 0, 1]
    assert [row["norm"]["mean"] for row in one["figures"]] == pytest.approx([50, 13, 3], rel=1e-5)
    weight = math.sqrt(sum(load_shard(base, name(2, part)).float().square().sum().item() for part in shapes))
    assert one["figures"][0]["relative"]["mean"] == pytest.approx(50 / weight, rel=1e-5)
    down = one["figures"][1]["matrices"]["mlp.down_proj"]
    weight = load_shard(base, name(0, "down")).float().norm().item()
    assert (down["mean"], down["relative"]) == (pytest.approx(12, rel=1e-5), pytest.approx(12 / weight, rel=1e-5))
    # The mean of two, how far they are apart; and what layer 0 costs: as much again as a forward pass.
    grow("rank", tmp_path / "seed0", tmp_path / "seed1", "--start", base, "--cost", "--out", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "ranking.json").read_text())
    by_layer = {row["layer"]: row for row in two["figures"]}
    assert by_layer[0]["norm"] == pytest.approx({"mean": 19.5, "spread": 13 / math.sqrt(2)}, rel=1e-5)
    assert [by_layer[layer]["cost"] for layer in range(3)] == pytest.approx([2, 5 / 3, 4 / 3])
    assert by_layer[0]["score"]["mean"] == pytest.approx(19.5 / 2, rel=1e-5)
    # Growth reads it.
    grow("expand", base, tmp_path / "grown", "--layers", f"top:1:{tmp_path}/two/ranking.json")
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["growth"]["layers"] == [2]
    assert "nothing in it differs" in mistake("rank", base, "--start", base, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def load_shard(base: Path, tensor: str) -> torch.Tensor:
    return next(tensors[tensor] for tensors in map(load_file, base.glob("*.safetensors")) if tensor in tensors)


@pytest.mark.parametrize("method", ["g_train", "sft", pytest.param("g_freeze", marks=pytest.mark.full)])
def test_a_run_is_compared_with_what_it_started_from(text_base: Path, sums: Path, tmp_path: Path, method: str) -> None:
    """By the model that the run ended in, loaded, and its base."""
    expand(str(text_base), str(tmp_path / "grown"), layers="1,3")
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, method=method, max_steps=2)
    train(recipe, 1)
    grow("rank", tmp_path / "run", "--out", tmp_path / "ranks")
    rows = json.loads((tmp_path / "ranks" / "ranking.json").read_text())["figures"]
    found = {row["layer"]: row["matrices"] for row in rows}
    form = "stock" if method == "sft" else "grown"
    grow("consolidate", tmp_path / "run", tmp_path / "out", "--format", form)
    before, after = (decoder_mlps(load(path, torch.float32)) for path in (text_base, tmp_path / "out"))
    assert found.keys() == (before.keys() if method == "sft" else {1, 3})
    for layer, matrices in found.items():
        own, now = before[layer], after[layer] if method == "sft" else after[layer].grown
        change = now.down_proj.weight - own.down_proj.weight / (1 if method == "sft" else 2)
        # What is consolidated is rounded to bf16, the run's weights are not.
        assert matrices["mlp.down_proj"]["mean"] == pytest.approx(change.norm().item(), rel=0.02)
        change = now.up_proj.weight - own.up_proj.weight
        assert matrices["mlp.up_proj"]["mean"] == pytest.approx(change.norm().item(), rel=0.02)
        if method == "g_train":
            change = after[layer].trained.gate_proj.weight - own.gate_proj.weight
            assert matrices["mlp.trained.gate_proj"]["mean"] == pytest.approx(change.norm().item(), rel=0.02)
        assert ("self_attn.q_proj" in matrices) == (method == "sft")


def test_layers_by_their_gradient(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "r.yaml", text_base, tmp_path / "grown", sums, 2, train_batch_size=2)
    grow("rank", "--by", "gradient", "--recipe", recipe, "--batches", "2", "--out", tmp_path / "ranks")
    rows = json.loads((tmp_path / "ranks" / "ranking.json").read_text())["figures"]
    assert sorted(row["layer"] for row in rows) == [0, 1, 2, 3]
    assert all(row["norm"]["mean"] > 0 and row["norm"]["spread"] > 0 for row in rows)
    # Of one batch, by what torch says of the loss of its sequences taken together.
    from grow.analysis.gradients import gradient_norms
    from grow.data.packing import Epochs, PackedDataset, collate
    from grow.data.tokens import encode
    from grow.methods import read_recipe
    from grow.model.loss import labelled_logits

    settings = read_recipe(str(recipe))
    (norms,), layers = gradient_norms(settings, 1)
    assert layers == 4
    from transformers import AutoTokenizer

    examples = encode(
        rows_of(settings, "train"), AutoTokenizer.from_pretrained(text_base), template_of(settings)
    ).examples
    order = Epochs(PackedDataset(examples, settings.max_length, 256), 2, 0)
    model = load(text_base, torch.float32)
    logits, labels = labelled_logits(model, collate([order[0], order[1]]))
    torch.nn.functional.cross_entropy(logits, labels).backward()
    expected = model.model.layers[2].mlp.up_proj.weight.grad.norm().item()
    assert norms[2]["mlp.up_proj"][0] == pytest.approx(expected, rel=0.05)


def test_the_spectrum_of_known_matrices() -> None:
    for rank in (1, 7):
        update = matrix(5.0, rank, 3, (HIDDEN, WIDTH)).numpy()
        figures = spectrum(singular_values(update))
        assert figures["effective_rank"] == pytest.approx(rank, rel=1e-3)
        assert figures["stable_rank"] == pytest.approx(rank, rel=1e-3)
        assert figures["values_99"] == rank
    # By hand: 3 and 1, of which p = ¾, ¼.
    figures = spectrum(singular_values(np.diag([1.0, 3.0]).astype(np.float32)))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures["effective_rank"] == pytest.approx(math.exp(entropy))
    assert figures["stable_rank"] == pytest.approx(10 / 9)
    assert (figures["values_90"], figures["values_99"]) == (1, 2)
    values = np.random.default_rng(0).standard_normal((30, 50)).astype(np.float32)
    assert singular_values(values) == pytest.approx(np.linalg.svd(values, compute_uv=False), rel=1e-5)


def test_the_rounding_that_bf16_does() -> None:
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    rounded = (weight - weight.bfloat16().float()).norm().item()
    assert rounding_norm(from_tensor(weight)) == pytest.approx(rounded, rel=0.02)


def test_effective_rank_of_a_checkpoint(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", layers=2, hidden=HIDDEN, width=WIDTH)
    by = {
        name(0, "gate"): matrix(1.0, 3, 0, (WIDTH, HIDDEN)),
        name(1, "down"): torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(1)),
        name(1, "up"): torch.full((WIDTH, HIDDEN), 1e-5),
    }
    stock = moved(base, tmp_path / "stock", by)
    said = grow("effective-rank", stock, "--start", base, "--out", tmp_path / "ranks").stdout
    assert "mlp.gate_proj" in said and (tmp_path / "ranks" / "effective_rank.png").stat().st_size > 1000
    found = {
        (f["layer"], f["matrix"]): f
        for f in json.loads((tmp_path / "ranks/effective_rank.json").read_text())["updates"]
    }
    assert found.keys() == {(0, "mlp.gate_proj"), (1, "mlp.down_proj"), (1, "mlp.up_proj")}, (
        "what did not move is not there"
    )
    low, noise, tiny = (found[key] for key in ((0, "mlp.gate_proj"), (1, "mlp.down_proj"), (1, "mlp.up_proj")))
    assert low["effective_rank"] == pytest.approx(3, rel=0.01) and low["norm"] == pytest.approx(1, rel=1e-3)
    assert noise["effective_rank"] == pytest.approx(noise["random"]["effective_rank"], rel=0.1)
    assert low["rounding"]["above"] == 3 and low["rounding"]["ratio"] > 1
    assert tiny["rounding"]["above"] == 0 and tiny["rounding"]["ratio"] < 0.1
