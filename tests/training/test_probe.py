"""What a run watches while it trains: retention, KL from the base inside, its throughput."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from grow.checkpoint.expand import expand
from grow.data.load import load_rows
from grow.data.packing import PackedDataset, collate
from grow.data.template import Template
from grow.data.tokens import encode
from grow.methods import METHODS
from grow.model.loading import load
from grow.model.loss import labelled_logits
from tests.helpers.running import train
from tests.helpers.tiny import grow, make_data, make_recipe, run


@pytest.mark.parametrize(
    ("method", "stage", "rate"),
    [
        ("g_freeze", 3, 1e-3),
        pytest.param("g_freeze", 2, 1e-3, marks=pytest.mark.full),
        pytest.param("g_lora", 3, 1e-2, marks=pytest.mark.full),
        pytest.param("lora", 3, 1e-2, marks=pytest.mark.full),
    ],
)
def test_the_probe_sees_what_a_second_model_would(
    text_base: Path, method: str, stage: int, rate: float, tmp_path: Path
) -> None:
    expand(str(text_base), str(tmp_path / "grown"), layers="1,3")
    data = make_data(tmp_path / "data")
    recipe = make_recipe(
        tmp_path / "recipe.yaml", text_base, tmp_path / "grown", data, stage, retention=str(data), probe_rows=20,
        retention_prompt="{question}", retention_completion="{answer}", dtype="float32", learning_rate=rate,
        method=method,
    )  # fmt: skip
    said = run("launch/train.sh", recipe, NPROC="2").stdout
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    lines = state["log_history"]
    probes = [line for line in lines if "kl_from_base" in line]
    first, last = probes[0], probes[-1]
    for probe in probes:
        assert (
            f"step {probe['step']}/4  validation  loss {probe['eval_loss']:.4f}  accuracy {probe['eval_accuracy']:.1%}"
            f"  retention {probe['retention']:.3f}  KL from the base {probe['kl_from_base']:.4f}\n"
        ) in said
    assert last["kl_from_base"] > first["kl_from_base"] == 0
    grows = METHODS[method].grows
    if grows:
        assert last["update_max"] > first["update_max"] == 0
        assert last["cosine_min"] < 1 and first["cosine_min"] == pytest.approx(1)
    assert all(line["tokens_per_second"] > line["labels_per_second"] > 0 for line in lines if "loss" in line)

    # The same from the consolidated checkpoint, and the base, each loaded by itself.
    grow("consolidate", tmp_path / "run", tmp_path / "trained", "--format", "grown" if grows else "stock")
    from transformers import AutoTokenizer

    rows = load_rows(str(data), "test").select(range(20))
    template = Template("{question}", "{answer}")
    examples = encode(rows, AutoTokenizer.from_pretrained(text_base), template, end=False).examples
    batch = collate([PackedDataset(examples[i : i + 1], 32, 0)[0] for i in range(len(examples))])
    with torch.no_grad():
        logits, labels = labelled_logits(load(tmp_path / "trained", torch.float32), batch)
        before = labelled_logits(load(text_base, torch.float32), batch)[0].log_softmax(-1)
    now = logits.log_softmax(-1)
    likelihood = now.gather(1, labels[:, None]).sum() / len(examples)
    divergence = torch.nn.functional.kl_div(now, before, reduction="sum", log_target=True) / len(labels)
    # What is consolidated is rounded to bf16, the run is not.
    assert last["retention"] == pytest.approx(likelihood.item(), abs=0.02)
    assert last["kl_from_base"] == pytest.approx(divergence.item(), rel=0.1)
    if grows:
        layers = [json.loads(line)["layers"] for line in (tmp_path / "run" / "probe.jsonl").read_text().splitlines()]
        assert len(layers) == len(probes) and all(len(step) == 2 for step in layers)


def test_what_comes_after_a_checkpoint_is_measured_anew(text_base: Path, tmp_path: Path) -> None:
    """A killed run resumes from its last checkpoint; no step is in the file twice."""
    expand(str(text_base), str(tmp_path / "grown"), layers="1,3")
    data = make_data(tmp_path / "data")
    recipe = make_recipe(
        tmp_path / "recipe.yaml", text_base, tmp_path / "grown", data, 2, retention=str(data), probe_rows=4,
        retention_prompt="{question}", retention_completion="{answer}", eval_steps=1,
    )  # fmt: skip
    train(recipe, 1)
    probes = tmp_path / "run" / "probe.jsonl"
    steps = [json.loads(line)["step"] for line in probes.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "COMPLETE").unlink()
    train(tmp_path / "run", 1)  # by its own recipe
    assert [json.loads(line)["step"] for line in probes.read_text().splitlines()] == steps
