"""Generates text after a prompt, and scores it against a reference."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from grow.data.encoder import Encoder
from grow.data.images import TOKEN_TYPES
from grow.data.rows import Rows
from grow.data.template import Template
from grow.data.tokenizer import pad_token_id
from grow.data.writing import write

_AT_A_TIME = 16
_DRAWS = 1000


@dataclass(frozen=True)
class Asked:
    """Holds a row as a prompt: the tokens before its last learnt span, as in training, and that span as the reference;
    and what a model is given of its images."""

    prompt: str
    ids: list[int]
    reference: str
    reference_ids: list[int]
    images: dict[str, torch.Tensor]


def generate(
    model: Any, tokenizer: Any, template: Template, rows: Rows, most: int | None = None
) -> list[dict[str, str]]:
    """Returns what the model writes, greedily, after each row's prompt; with prompt and reference.

    It writes up to an end token or, where all references are of one line, to the line's end, and at most `most` tokens,
    or twice as many as the longest reference of its batch has. The model's own generation config (sampling, penalties,
    lengths) is ignored, except for its end tokens.
    """
    encoder = Encoder(tokenizer, template)
    asked = [_asked(encoder, row) for row in rows]
    if not asked:
        return []
    ends = _ends(model, encoder, asked)
    # Rows of similar length share a batch, which is as long as its longest row.
    order = sorted((i for i, row in enumerate(asked) if not row.images), key=lambda i: len(asked[i].ids))
    parts = [order[first : first + _AT_A_TIME] for first in range(0, len(order), _AT_A_TIME)]
    parts += [[i] for i, row in enumerate(asked) if row.images]
    texts: dict[int, str] = {}
    for part in tqdm(parts, desc="writing", leave=False, disable=None):
        of_batch = [asked[i] for i in part]
        tokens = most or 2 * max(len(row.reference_ids) for row in of_batch)
        written = _written(model, of_batch, tokens, ends, pad_token_id(tokenizer))
        texts |= dict(zip(part, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True))
    several = any("\n" in row.reference for row in asked)
    return [
        {
            "prompt": row.prompt.removeprefix(tokenizer.bos_token or ""),
            "reference": row.reference,
            "output": _cut(texts[index].strip(), several),
        }
        for index, row in enumerate(asked)
    ]


def _cut(text: str, several_lines: bool) -> str:
    return text if several_lines else text.split("\n")[0]


def _asked(encoder: Encoder, row: dict[str, Any]) -> Asked:
    shown = encoder.shown(row)
    begin, end = shown.spans[-1]
    last = len(shown.learnt) - 1 - shown.learnt[::-1].index(True)
    first = last
    while first > 0 and shown.learnt[first - 1]:
        first -= 1
    reference = encoder.special.removed(shown.text[begin:end]).strip()
    images = encoder.images.inputs(row, shown.ids[:first], shown.images) if encoder.images else {}
    return Asked(shown.text[:begin], shown.ids[:first], reference, shown.ids[first : last + 1], images)


def _ends(model: Any, encoder: Encoder, asked: list[Asked]) -> list[int]:
    """Returns the tokens at which generation stops: ends of a text and of a turn; and of a line, if no reference has
    one."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), encoder.tokenizer.eos_token_id}
    ends |= {number for row in asked for number in row.reference_ids if number in encoder.special.own}
    line_end = encoder.tokenizer("\n", add_special_tokens=False).input_ids
    if len(line_end) == 1 and not any(line_end[0] in row.reference_ids for row in asked):
        ends.add(line_end[0])
    return sorted(number for number in ends if number is not None)


def _written(model: Any, part: list[Asked], tokens: int, ends: list[int], pad: int) -> torch.Tensor:
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=True, eos_token_id=ends or None,
        pad_token_id=pad,
    )  # fmt: skip
    images = {name: tensor[None] if name in TOKEN_TYPES else tensor for name, tensor in part[0].images.items()}
    return write(model, [row.ids for row in part], settings, **{n: t.to(model.device) for n, t in images.items()})


def translation_scores(outputs: list[str], references: list[str]) -> dict[str, Any]:
    """Returns chrF2 and BLEU of a corpus, 0 to 100, with the 2.5th to the 97.5th percentile of sacrebleu's bootstrap,
    and its signatures (Post 2018)."""
    from sacrebleu.metrics import BLEU, CHRF

    scores: list[float] = []  # of the corpus, and then of its resamples

    class Kept:
        """sacrebleu gives a mean and a width of the resamples' scores, which may reach below 0."""

        def _compute_score_from_stats(self, stats: Any) -> Any:
            score = super()._compute_score_from_stats(stats)  # type: ignore[misc]
            score.score = float(score.score)  # it fails to average floats with NumPy's, of which it has both
            scores.append(score.score)
            return score

    class Chrf(Kept, CHRF): ...

    class Bleu(Kept, BLEU): ...

    found: dict[str, Any] = {"intervals": {}}
    for name, metric in (("chrf", Chrf()), ("bleu", Bleu())):
        scores.clear()
        found[name] = float(metric.corpus_score(outputs, [references], n_bootstrap=_DRAWS).score)
        low, high = np.percentile(scores[1:], (2.5, 97.5))
        found["intervals"][name] = (float(low), float(high))
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
