"""Text that a model writes: what follows prompts, and, from the token that begins a text, text of its own."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import GenerationConfig
from xxhash import xxh3_128_hexdigest

from grow.checkpoint.files import write_json
from grow.checkpoint.shards import read_json
from grow.data.tokenizer import pad_token_id
from grow.errors import UserError

SELF_TOKENS, SELF_LENGTH = 16_384, 64
"""Tokens of a base's own text, and of one of its passages."""
_AT_A_TIME = 64


def write(model: Any, prompts: list[list[int]], settings: GenerationConfig, **options: Any) -> torch.Tensor:
    """Returns what the model writes after each prompt, int64 [B, new tokens]; settings.pad_token_id fills it up.

    Nothing is taken from the generation config of the model. `options` go to `generate`.
    """
    width = max(1, *map(len, prompts))
    ids = torch.full((len(prompts), width), settings.pad_token_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[index, width - max(1, len(prompt)) :] = 1
    with _no_config_of_its_own(model, settings):
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings, **options
        )
    return written[:, width:]


@contextlib.contextmanager
def _no_config_of_its_own(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation config, from which transformers takes whatever a call leaves open."""
    before, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = before


def sampled(model: Any, prompts: list[list[int]], tokens: int, seed: int, tokenizer: Any, what: str) -> list[list[int]]:
    """Returns what the model writes after each prompt at temperature 1: up to an end token, at most `tokens` tokens."""
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id(tokenizer),
    )  # fmt: skip
    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    bar = tqdm(total=len(prompts), desc=what, leave=False, disable=None)
    with bar, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(order), _AT_A_TIME):
            part = order[first : first + _AT_A_TIME]
            lines = write(model, [prompts[i] for i in part], settings, logits_processor=[_drawn]).tolist()
            for index, written in zip(part, lines, strict=True):
                end = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
                found[index] = written[:end]
            bar.update(len(part))
    return [found[index] for index in range(len(prompts))]


def _drawn(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Leaves one token of each distribution, [B, V], drawn from it: from sums of probabilities, which takes a fifth of
    the time of torch.multinomial on a processor."""
    sums = scores.softmax(-1).cumsum_(-1)
    drawn = torch.searchsorted(sums, torch.rand(len(sums), 1, device=sums.device) * sums[:, -1:], right=True)
    return torch.full_like(scores, -torch.inf).scatter_(1, drawn.clamp(max=scores.shape[1] - 1), 0.0)


def begin_token(tokenizer: Any) -> int:
    """Returns the token that begins a text: BOS or, where there is none, the one that ends it. Raises UserError where
    the tokenizer has neither."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no BOS token, and no EOS token, to begin text from"
        )
    return int(first)


def self_text(
    model: Callable[[], Any],
    tokenizer: Any,
    base: str,
    tokens: int = SELF_TOKENS,
    seed: int = 0,
    length: int = SELF_LENGTH,
) -> list[list[int]]:
    """Returns text that a model writes by itself at temperature 1, BOS included: `tokens` in all, in passages of at
    most `length`. It is kept in GROW_CACHE by `base`, which stands for the model's weights (a checksum), and the
    numbers; `model` returns the model, if it is needed."""
    key = xxh3_128_hexdigest(repr([base, tokens, seed, length]).encode())
    folder = Path(os.environ.get("GROW_CACHE", "~/.cache/grow")).expanduser() / "self_text"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        file = folder / f"{key}.json"
        if not file.is_file():
            first = begin_token(tokenizer)
            count = -(-tokens // length)
            written = sampled(model(), [[first]] * count, length - 1, seed, tokenizer, "the base writes")
            write_json(file, {"passages": [[first, *ids] for ids in written]})
        return [list(map(int, ids)) for ids in read_json(file)["passages"]]


def text_checksum(passages: list[list[int]]) -> str:
    """Returns XXH3-128 of tokenised passages."""
    return xxh3_128_hexdigest(json.dumps(passages).encode())
