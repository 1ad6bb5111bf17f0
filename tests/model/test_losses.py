"""What flow, stm and ewc do to the loss, against their formulas computed another way."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from grow.data.labels import IGNORED
from grow.data.load import load_rows
from grow.data.packing import Epochs, PackedDataset
from grow.data.template import Template
from grow.data.tokens import encode
from grow.errors import UserError
from grow.methods import read_recipe
from grow.methods.baselines.ewc import Ewc, squared_distance
from grow.methods.baselines.flow import Flow
from grow.methods.baselines.stm import Stm
from grow.model.loading import load
from grow.model.loss import loss_sum
from grow.training.check import check_run
from tests.helpers.running import alone, rows_of
from tests.helpers.tiny import make_recipe


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_losss_gradient_is_autograds(dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(600, 50, dtype=dtype)  # more rows than are in memory at once
    labels, weights = torch.randint(0, 50, (600,)), torch.rand(600)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = loss_sum(ours, labels, weights) / 7
    expected = torch.nn.functional.cross_entropy(theirs.float(), labels, reduction="none") @ weights / 7
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
    assert torch.allclose(ours.grad, theirs.grad, rtol=near, atol=near / 100)
    assert loss_sum(logits, labels).item() == pytest.approx(loss_sum(logits, labels, torch.ones(600)).item())


def stub(base: Path, sums: Path, **fields: Any) -> Any:
    """What the methods see of a trainer, of one rank, on some rows."""
    examples = rows_of(base, sums, "train")[:40]
    model = load(base, torch.float32)
    # Two rows are too long for any sequence.
    longest = sorted(len(example.labels) for example in examples)[-3]
    sequences = PackedDataset(examples, max(longest, 7), 256)
    losses = [torch.full((len(example.labels),), torch.nan) for example in examples]
    for row in sequences.packed.tolist():
        losses[row][torch.tensor(examples[row].labels) != IGNORED] = alone(model, examples[row])
    return SimpleNamespace(
        model=model,
        start_losses=lambda: losses,
        train_dataset=Epochs(sequences, 8, 0),
        recipe=SimpleNamespace(images="", **fields),
        args=SimpleNamespace(process_index=0, world_size=1, device="cpu"),
    )


def test_flow_weights_rows_by_the_base_loss(text_base: Path, sums: Path) -> None:
    trainer, method = stub(text_base, sums), Flow()
    method.begin(trainer)
    packed = sorted(trainer.train_dataset.sequences.packed.tolist())
    mean = {row: trainer.start_losses()[row].nanmean().item() for row in packed}
    median = sorted(mean.values())[(len(packed) - 1) // 2]
    weights = {row: math.exp(-loss / median) for row, loss in mean.items()}
    scale = sum(weights.values()) / len(weights)
    found = method.token_weights(torch.tensor(packed))
    assert found is not None
    assert found.tolist() == pytest.approx([weights[row] / scale for row in packed], rel=1e-4)
    easiest, hardest = min(packed, key=mean.__getitem__), max(packed, key=mean.__getitem__)
    assert weights[easiest] > weights[hardest]


def test_stm_masks_what_the_base_finds_improbable(text_base: Path, sums: Path) -> None:
    trainer = stub(text_base, sums)
    examples = trainer.train_dataset.sequences.examples
    before = [list(example.labels) for example in examples]
    Stm(stm_threshold=300.0).begin(trainer)
    kept = masked = 0
    for labels, example, losses in zip(before, examples, trainer.start_losses(), strict=True):
        for label, left, loss in zip(labels, example.labels, losses.tolist(), strict=True):
            keep = label != IGNORED and math.exp(loss) <= 300
            assert left == (label if keep else IGNORED)
            kept, masked = kept + keep, masked + (label != IGNORED and not keep)
    assert kept and masked
    with pytest.raises(UserError, match="every label"):
        Stm(stm_threshold=1.01).begin(trainer)


def test_ewc_holds_weights_by_their_fisher_information(text_base: Path, sums: Path) -> None:
    fields = {"retention_prompt": "{question}", "retention_completion": "{answer}", "max_length": 32}
    trainer = stub(text_base, sums, retention=str(sums), start=str(text_base), **fields)
    method = Ewc(ewc_lambda=3.0, ewc_rows=5, ewc_split="test")
    method.begin(trainer)
    assert torch.as_tensor(method.penalty()).item() == 0
    model: Any = load(text_base, torch.float32)
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    rows = load_rows(str(sums), "test").select(range(5))
    for example in encode(rows, tokenizer, Template("{question}", "{answer}"), end=False).examples:
        model.zero_grad()
        out = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        (-sum(out[i, label] for i, label in enumerate(example.labels) if label != IGNORED)).backward()
        for name, parameter in model.named_parameters():
            fisher[name] += parameter.grad**2 / 5
    expected = 0.0
    for name, parameter in trainer.model.named_parameters():
        parameter.data += 0.01
        expected += 1.5 * (fisher[name] * (parameter - model.get_parameter(name)) ** 2).sum().item()
    assert torch.as_tensor(method.penalty()).item() == pytest.approx(expected, rel=1e-3) and expected > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ewcs_penalty_keeps_nothing_and_its_gradient_is_autograds(dtype: torch.dtype) -> None:
    """Real models train their vocabulary's embedding too: several copies of it in fp32 do not fit."""
    torch.manual_seed(0)
    theta, start = torch.randn(2, 1100, 1000).to(dtype)  # more than are in memory at once
    theta.requires_grad_()
    fisher = torch.rand(1100, 1000)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = squared_distance(theta, start, fisher)
    assert set(kept) <= {tensor.data_ptr() for tensor in (theta, start, fisher)}
    (gradient,) = torch.autograd.grad(3 * value, theta)
    plain = (fisher * (theta.float() - start.float()) ** 2).sum()
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(3 * plain, theta)
    assert torch.allclose(gradient, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2)


def test_ewc_is_refused_by_name_where_it_cannot_work(text_base: Path, sums: Path, tmp_path: Path) -> None:
    recipe = str(make_recipe(tmp_path / "r.yaml", text_base, tmp_path, sums, 3, method="ewc", retention=str(sums)))
    with pytest.raises(UserError, match=r"ewc does not work with ZeRO-3; .* stage 0 or 1 or 2"):
        check_run(read_recipe(recipe))
    zero2 = {"deepspeed": str(Path(recipe).parent / "zero2.json")}
    Path(zero2["deepspeed"]).write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match="retention"):
        check_run(read_recipe(recipe, zero2 | {"retention": "none"}))
    with pytest.raises(UserError, match="split nowhere"):
        check_run(read_recipe(recipe, zero2 | {"ewc_split": "nowhere"}))
