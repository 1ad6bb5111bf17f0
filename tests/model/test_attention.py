"""Packed rows see themselves alone, whichever attention there is; flash attention is told where they begin."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grow.data.examples import all_learnt
from grow.data.packing import PackedDataset, collate
from grow.errors import UserError
from grow.methods import read_recipe
from grow.model.attention import check_attention, check_installed, chosen_attention, set_attention
from grow.model.loading import load
from grow.model.loss import labelled_logits
from grow.training.check import check_run
from tests.checkpoint.test_architectures import make
from tests.helpers.tiny import make_recipe, tokens

pytestmark = pytest.mark.gpu
ROWS = [tokens(length, seed)[0].tolist() for seed, length in enumerate((9, 21, 17, 6, 30, 12))]


def by_lengths(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """What flash attention computes of cumulative lengths: [1, heads, tokens, features] → [1, tokens, heads, …]."""
    assert mask is None and len(query) == 1 and torch.equal(given["cu_seq_lens_q"], given["cu_seq_lens_k"])
    ends = given["cu_seq_lens_q"].tolist()
    assert ends[0] == 0 and ends[-1] == query.shape[2] and ends == sorted(set(ends))
    groups, found = query.shape[1] // key.shape[1], []
    for begin, end in itertools.pairwise(ends):
        assert end - begin <= given["max_length_q"] == given["max_length_k"]
        q, k, v = (one[:, :, begin:end] for one in (query, key, value))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None]
        seen = (distance >= 0) & (distance < (sliding_window or end))
        scores = q @ k.repeat_interleave(groups, 1).mT * scaling
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1))
    return torch.cat(found, 2).transpose(1, 2), None


@pytest.mark.parametrize("kind", ["", "gemma2", "llama", "qwen3", "gemma4"])
@pytest.mark.parametrize("how", ["sdpa", "eager", "flex_attention", "flash"])
def test_packed_rows_are_rows_alone(
    text_base: Path, tmp_path: Path, kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sliding windows too, which are shorter than some of these rows; in two sequences, padded."""
    if (kind, how) == ("gemma2", "sdpa"):
        return  # transformers has it not: SDPA knows no soft cap
    model: Any = load(make(tmp_path / "base", kind, sliding_window=16) if kind else text_base, torch.float32)
    batch = collate(list(PackedDataset(all_learnt(ROWS), 56, 0)))
    assert batch["input_ids"].shape == (2, 56)
    with torch.no_grad():
        alone = [model(torch.tensor([row]), use_cache=False).logits[0, :-1] for row in ROWS]
        if how == "flash":
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_like", by_lengths)
            for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
                config._attn_implementation_internal = "flash_like"
        else:
            model.set_attn_implementation(how)
        logits, labels = labelled_logits(model, batch)
    rows = batch["rows"][batch["labels"] >= 0]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(logits[rows == row], expected, atol=1e-5, rtol=1e-5)
    assert len(labels) == sum(len(row) - 1 for row in ROWS)


def test_what_is_not_there_is_refused(text_base: Path, sums: Path, tmp_path: Path) -> None:
    def check(**fields: Any) -> None:
        check_run(read_recipe(str(make_recipe(tmp_path / "r.yaml", text_base, text_base, sums, 1, **fields))))

    with pytest.raises(UserError, match="attn_implementation flash: there are auto, sdpa"):
        check(method="sft", attn_implementation="flash")
    model: Any = load(text_base)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="is not installed here"):
            check_installed("flash_attention_2")
        assert chosen_attention("auto", model) == "sdpa"
    monkey = type("NoFlex", (type(model),), {"_supports_flex_attn": False})
    with pytest.raises(UserError, match="NoFlex of transformers does not have it"):
        check_attention("flex_attention", monkey, model.config)
    with pytest.raises(UserError, match="GPTJForCausalLM of transformers does not have it"):
        check_attention("flash_attention_2", transformers.GPTJForCausalLM, model.config)
    wide = transformers.Gemma3TextConfig(head_dim=512)
    with pytest.raises(UserError, match=r"heads of 256 features at most, and .* has 512"):
        check_attention("flash_attention_2", type(model), wide)
    assert chosen_attention("eager", model) == "eager"


def test_auto_takes_flash_attention_where_it_can(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in half precision, for heads that are not too wide."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    available = dict.fromkeys(("flash_attention_2", "flash_attention_3"), lambda: True)
    monkeypatch.setattr("grow.model.attention._AVAILABLE", available)
    model: Any = load(text_base, torch.bfloat16)
    assert chosen_attention("auto", model) == "flash_attention_3"
    monkeypatch.setitem(available, "flash_attention_3", lambda: False)
    assert chosen_attention("auto", model) == "flash_attention_2"
    model.config.head_dim = 512
    assert chosen_attention("auto", model) == "sdpa"
    assert chosen_attention("auto", load(text_base, torch.float32)) == "sdpa"


def test_towers_keep_their_own(tmp_path: Path) -> None:
    """Gemma 4's for sound knows neither SDPA nor FlexAttention; text does not pass through it."""
    model: Any = load(make(tmp_path / "base", "gemma4-e2b"))
    before = model.config.audio_config._attn_implementation
    set_attention(model, "auto")
    set_attention(model, "flex_attention")
    assert model.config.get_text_config()._attn_implementation == "flex_attention"
    assert model.config.audio_config._attn_implementation == before
