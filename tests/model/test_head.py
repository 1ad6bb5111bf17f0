"""The head and the loss in pieces: the loss and the gradients of whole logits, for classes that scale and cap too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grow.data.examples import all_learnt
from grow.data.labels import IGNORED
from grow.data.packing import PackedDataset, collate
from grow.model import head
from grow.model.loading import load
from grow.model.loss import labelled_logits, loss_sum, token_scores
from tests.checkpoint.test_architectures import make
from tests.helpers.tiny import tokens

pytestmark = pytest.mark.gpu


def batch() -> dict[str, torch.Tensor]:
    """Two packed sequences with some labels."""
    rows = [tokens(length, seed)[0].tolist() for seed, length in enumerate((9, 14, 17, 6))]
    found = collate(list(PackedDataset(all_learnt(rows), 24, 0)))
    found["labels"][found["position_ids"] < 3] = IGNORED
    return found


@pytest.mark.parametrize("kind", ["gemma2", "gemma4", "cohere", "granite", "gpt2", "pythia", "llama"])
@pytest.mark.parametrize("trains", [True, False])
def test_pieces_are_what_the_whole_is(kind: str, trains: bool, tmp_path: Path, monkeypatch: Any) -> None:
    make(tmp_path / "base", kind)
    model, rows = load(tmp_path / "base", torch.float32), batch()
    known = head.known_head(model)
    assert known is not None
    monkeypatch.setattr(head, "PIECE", 5 * 4 * known.layer.weight.shape[0])  # five labels
    model.get_output_embeddings().requires_grad_(trains)
    count = int((rows["labels"] >= 0).sum())
    assert count > 20
    weights = torch.linspace(0.5, 2, count)
    found = []
    for pieces in (False, True):
        model.zero_grad()
        if pieces:
            loss = head.head_loss_sum(model, known, rows, weights)
            scores = head.head_scores(model, known, rows)
        else:
            loss = loss_sum(*labelled_logits(model, rows), weights)
            scores = token_scores(model, rows)[:2]
        (loss / 7).backward()
        found.append((loss.detach(), *scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, likely, hits, gradients), (own_loss, own_likely, own_hits, own_gradients) = found
    torch.testing.assert_close(own_loss, loss)
    torch.testing.assert_close(own_likely, likely)
    assert torch.equal(own_hits, hits) and own_gradients.keys() == gradients.keys()
    torch.testing.assert_close(own_gradients, gradients, atol=1e-5, rtol=1e-4)


def test_no_logits_are_ever_whole(tmp_path: Path, monkeypatch: Any) -> None:
    make(tmp_path / "base", "gemma2")
    model, rows = load(tmp_path / "base", torch.float32), batch()
    known, seen = head.known_head(model), []
    assert known is not None
    monkeypatch.setattr(head, "PIECE", 5 * 4 * known.layer.weight.shape[0])
    known.layer.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[0]))
    head.head_loss_sum(model, known, rows).backward()
    assert max(seen) == 5 and sum(seen) == int((rows["labels"] >= 0).sum())


def test_a_head_of_another_kind_is_left_whole(tmp_path: Path) -> None:
    make(tmp_path / "base", "llama")
    model: Any = load(tmp_path / "base", torch.float32)
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        assert head.known_head(model) is not None
        assert torch.equal(before, torch.random.get_rng_state())

    def doubled(_: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(doubled)
    assert head.known_head(model) is None


def test_rows_without_labels(tmp_path: Path) -> None:
    make(tmp_path / "base", "llama")
    model, rows = load(tmp_path / "base", torch.float32), batch()
    known = head.known_head(model)
    assert known is not None
    rows["labels"][:] = IGNORED
    head.head_loss_sum(model, known, rows).backward()
    assert [len(values) for values in head.head_scores(model, known, rows)] == [0, 0]
