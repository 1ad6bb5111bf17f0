"""Rows, labels, packing and order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from grow.data.labels import IGNORED
from grow.data.load import load_rows
from grow.data.packing import Epochs, Mixed, PackedDataset, collate, pack
from grow.data.template import Template
from grow.data.tokens import encode
from grow.errors import UserError
from grow.model.loading import load
from grow.model.loss import labelled_logits, loss_sum, token_scores
from tests.helpers.running import rows_of

TEMPLATE = Template("Q: {q}\nA:", " {a}")
ROWS = [{"q": "How many legs has a spider " + "or two " * n, "a": f"eight, {n} times"} for n in range(8)]
ROWS += [{"q": "?", "a": "!" * n} for n in range(1, 5)]


def test_labels_are_the_completion_and_an_end(text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    (example,) = encode([{"q": "x", "a": "yes"}], tokenizer, TEMPLATE).examples
    labels = [token for token in example.labels if token != IGNORED]
    assert tokenizer.decode(labels) == " yes<eos>"
    assert tokenizer.decode(example.input_ids) == "<bos>Q: x\nA: yes"
    # The label at a position is the token after it.
    assert example.labels[:-1][-4:] == example.input_ids[-4:]


def test_a_template_that_does_not_fit(text_base: Path) -> None:
    with pytest.raises(UserError, match="question is not among the columns q, a"):
        encode(ROWS, AutoTokenizer.from_pretrained(text_base), Template("{question}", " {a}"))


def test_packing_loses_no_row(text_base: Path) -> None:
    examples = encode(ROWS, AutoTokenizer.from_pretrained(text_base), TEMPLATE).examples
    packed, starts = pack(examples.lengths, 70)
    kept = [i for i, example in enumerate(examples) if len(example.input_ids) <= 70]
    assert sorted(packed.tolist()) == kept and len(kept) < len(examples)
    sequences = np.split(packed, starts[1:-1])
    assert all(0 < examples.lengths[sequence].sum() <= 70 for sequence in sequences)
    assert len(sequences) < len(kept)


def test_packing_is_best_fit_the_longest_first() -> None:
    """One by one, as the algorithm is written down; `pack` places equal lengths at once."""
    lengths = np.random.default_rng(0).integers(1, 90, 700)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(5)).tolist()
    order.sort(key=lambda i: -lengths[i])
    expected: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(101)]
    for index in order:
        left = next((r for r in range(lengths[index], 101) if room[r]), 100)
        if not room[left]:
            room[left].append(len(expected))
            expected.append([])
        sequence = room[left].pop()
        expected[sequence].append(index)
        room[left - lengths[index]].append(sequence)
    packed, starts = pack(lengths, 100, seed=5)
    assert [part.tolist() for part in np.split(packed, starts[1:-1])] == expected


@pytest.mark.parametrize("which", ["text_base", "real_base"])
def test_a_packed_row_has_its_loss_as_if_alone(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    model = load(path, torch.float32)
    examples = encode(ROWS[:6], AutoTokenizer.from_pretrained(path), TEMPLATE).examples
    longest = max(len(example.input_ids) for example in examples)
    sequences = PackedDataset(examples, 3 * longest, pad_token_id=0)
    batch = collate([sequences[i] for i in range(len(sequences))])
    assert len(sequences) < len(examples) and (batch["rows"] == -1).any(), "several rows in one, and padding"
    logprobs, _, rows = token_scores(model, batch)
    for i, example in enumerate(examples):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        labels = torch.tensor(example.labels)
        alone = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        assert -logprobs[rows == i].mean() == pytest.approx(alone.item(), abs=1e-5)
    # Were the positions not to restart, the rows would see each other.
    run_on = batch | {"position_ids": torch.arange(sequences.max_length).expand_as(batch["input_ids"])}
    assert (token_scores(model, run_on)[0] - logprobs).abs().max() > 1e-3


def test_the_loss_is_that_of_all_logits(text_base: Path) -> None:
    model = load(text_base, torch.float32)
    examples = encode(ROWS, AutoTokenizer.from_pretrained(text_base), TEMPLATE).examples
    sequences = PackedDataset(examples, 200, pad_token_id=0)
    batch = collate([sequences[0], sequences[1]])
    logits, labels = labelled_logits(model, batch)
    assert logits.shape == (len(labels), 320)
    whole = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        whole.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert loss_sum(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_order_is_a_function_of_the_index(text_base: Path) -> None:
    examples = encode(ROWS, AutoTokenizer.from_pretrained(text_base), TEMPLATE).examples
    sequences = PackedDataset(examples, 120, pad_token_id=0, seed=3)
    count = len(sequences)
    in_order = [tuple(item["rows"].tolist()) for item in (Epochs(sequences, 3 * count, 3)[i] for i in range(3 * count))]
    epochs = [in_order[e * count : (e + 1) * count] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]
    backwards = Epochs(sequences, 3 * count, 3)
    assert [tuple(backwards[i]["rows"].tolist()) for i in reversed(range(3 * count))] == in_order[::-1]
    for length in (3, 3 * count):
        seen: Any = Epochs(sequences, length, 3).seen()
        assert [tuple(item["rows"].tolist()) for item in seen] == in_order[: min(length, count)], "none twice"


def test_bad_rows_are_named_and_too_many_end_the_run(text_base: Path, tmp_path: Path) -> None:
    good = ['{"q": "x", "a": "yes"}'] * 95
    bad = ['{"q": "x", "a": " "}', '{"q": "x"}', '{"q": "' + "x" * 300 + '", "a": "yes"}']
    (tmp_path / "train.jsonl").write_bytes(
        b"\n".join([line.encode() for line in good + bad] + [b'{"q":"\xff","a":"y"}'])
    )
    encoded = encode(
        load_rows(str(tmp_path), "train"), AutoTokenizer.from_pretrained(text_base), TEMPLATE, max_length=64
    )
    assert encoded.bad == {
        "empty": [95], "without a value in a column": [96], "not UTF-8": [98],
        "longer than max_length, 64 tokens": [97],
    }  # fmt: skip
    assert len(encoded.examples) == 95
    with pytest.raises(UserError, match=r"4 of 99 rows cannot be used: 1 empty \(row 95\); 1 without"):
        encoded.check("data", 0.01)
    encoded.check("data", 0.05)


def test_chat_is_learnt_where_the_assistant_speaks(text_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you")]
    row = {"chat": [{"role": role, "content": content} for role, content in turns]}
    encoded = encode([row, {"chat": []}], tokenizer, Template(messages="chat"))
    (example,) = encoded.examples
    assert tokenizer.decode(example.input_ids + example.labels[-1:]) == (
        "<bos><user>Hi</><assistant>Hello!</><user>Bye</><assistant>See you</>"
    )
    assert tokenizer.decode([t for t in example.labels if t != IGNORED]) == "Hello!</>See you</>"
    assert encoded.bad == {"without an assistant's turn": [1]}


def test_mixed_in_shares(sums: Path, text_base: Path) -> None:
    """At any point each data set has its share, to a sequence; each in its own order, epoch after epoch."""
    packed = [PackedDataset(rows_of(text_base, sums, split), 32, 0) for split in ("train", "validation", "test")]
    main, first, second = packed
    whole = Mixed(main, [(first, 0.2), (second, 0.1)], 200, seed=3)
    assert len(whole) == 200 and whole.share == pytest.approx(0.7)
    sizes = [len(own.examples) for own in packed]
    bounds = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    counts = [0, 0, 0]
    alone = [Epochs(own, 200, 3) for own in packed]
    for index in range(200):
        item = whole[index]
        rows = item["rows"][item["rows"] >= 0]
        (source,) = {sum(int(row) >= bound for bound in bounds[1:3]) for row in rows}
        expected = alone[source][counts[source]]
        assert torch.equal(item["input_ids"], expected["input_ids"])
        assert torch.equal(rows - bounds[source], expected["rows"][expected["rows"] >= 0])
        counts[source] += 1
        assert all(abs(n - share * (index + 1)) <= 1 for n, share in zip(counts, (0.7, 0.2, 0.1), strict=True))
    assert len(whole.seen()) == min(counts[0], len(main))  # type: ignore[arg-type]
    again = Mixed(main, [(first, 0.2), (second, 0.1)], 200, seed=3)
    assert torch.equal(again[150]["input_ids"], whole[150]["input_ids"]), "found by counting, wherever a run resumes"
