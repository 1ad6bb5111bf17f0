"""What a step takes, as grow.training.flops has it, is what torch counts of matrix products while it runs."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grow.methods import METHODS
from grow.model.loading import load
from grow.model.loss import labelled_logits, loss_sum
from grow.training.flops import StepFlops
from tests.helpers.tiny import grow, tokens


def counted(model: torch.nn.Module, labels: int, length: int) -> int:
    """FLOPs of matrix products, forward and backward; attention's own are of other operations, or in 3-D."""
    ids = tokens(length)
    targets = torch.where(torch.arange(length) < labels, ids, -100)
    batch = {"input_ids": ids, "position_ids": torch.arange(length)[None], "labels": targets}
    with FlopCounterMode(display=False) as counter:
        loss_sum(*labelled_logits(model, batch)).backward()
    return sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm")
    )


@pytest.mark.parametrize(
    "method, layers",
    [("sft", None), ("g_freeze", "all"), ("g_freeze", "2-3"), ("g_train", "0,3"), ("g_lora", "1,2"), ("lora", None)],
)
def test_a_steps_flops_are_those_that_torch_counts(
    text_base: Path, tmp_path: Path, method: str, layers: str | None
) -> None:
    start = text_base
    if layers:
        grow("expand", start, tmp_path / "grown", "--layers", layers)
        start = tmp_path / "grown"
    model = load(start, torch.float32)
    METHODS[method]().prepare(model)
    expected = StepFlops(model).of(tokens=40, labels=10)
    assert expected == pytest.approx(
        counted(model.train(), labels=10, length=40), rel=0.04
    )  # four layers: the lowest is a quarter of them
