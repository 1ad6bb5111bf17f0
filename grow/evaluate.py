"""How well a checkpoint does the recipe's task, and what it still knows: one forward pass over held-out rows."""

import math
from collections import defaultdict
from typing import Any

import torch
from tqdm import tqdm

from grow.errors import UserError
from grow.loss import token_scores
from grow.model import compute_dtype, load
from grow.recipe import Recipe
from grow.tasks import Example, PackedDataset, collate, encode


def evaluate(
    path: str, recipe: Recipe, alpha: float = 1.0, samples: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Scores one checkpoint, stock, grown or an adapter's folder.

    Returns, under "task" (test rows) and "retention" (rows of old knowledge): `loss`, nats per labelled token;
    `token_accuracy`, the share of labelled tokens that are the likeliest; `exact_match`, the share of rows where all
    are, which is what greedy decoding would give; `log_likelihood`, nats per row, the mean over rows; `rows`.
    Under "samples" what the model writes for the first test rows. `alpha` is the dial of a grown model.
    """
    from transformers import AutoTokenizer

    rows = recipe.rows(recipe.test_split)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    model = load(path, compute_dtype(), alpha)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    examples = encode(rows, tokenizer, recipe.template, recipe.max_length).examples
    result: dict[str, Any] = {"checkpoint": path, "alpha": alpha, "dtype": str(model.dtype)}
    result["task"] = score(model, examples, recipe, tokenizer.pad_token_id, "task")
    if recipe.retention:
        known = recipe.retention_rows()
        # No end token: the question is whether the answer comes, not whether the text ends there.
        examples = encode(known, tokenizer, recipe.retention_template, recipe.max_length, end=False).examples
        result["retention"] = score(model, examples, recipe, tokenizer.pad_token_id, "retention")
    result["samples"] = _write(model, tokenizer, recipe, rows.select(range(min(samples, len(rows)))))
    return result


def score(model: Any, examples: list[Example], recipe: Recipe, pad_token_id: int | None, what: str) -> dict[str, Any]:
    """Scores of tokenised rows (see evaluate); rows longer than a sequence are left out and not counted."""
    sequences = PackedDataset(examples, recipe.max_length, pad_token_id or 0)
    if not len(sequences):
        raise UserError(f"no row to score for {what}: all are longer than max_length {recipe.max_length} tokens")
    logprob: dict[int, float] = defaultdict(float)
    hits: dict[int, list[bool]] = defaultdict(list)
    size = recipe.per_device_eval_batch_size
    for start in tqdm(range(0, len(sequences), size), desc=what, leave=False, disable=None):
        batch = collate([sequences[i] for i in range(start, min(start + size, len(sequences)))])
        scores = token_scores(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        for value, hit, row in zip(*(tensor.tolist() for tensor in scores), strict=True):
            logprob[row] += value
            hits[row].append(hit)
    tokens = sum(len(row) for row in hits.values())
    return {
        "loss": -math.fsum(logprob.values()) / tokens,
        "token_accuracy": sum(sum(row) for row in hits.values()) / tokens,
        "exact_match": sum(all(row) for row in hits.values()) / len(hits),
        "log_likelihood": math.fsum(logprob.values()) / len(hits),
        "rows": len(hits),
    }


def _write(model: Any, tokenizer: Any, recipe: Recipe, rows: Any) -> list[dict[str, str]]:
    """What the model writes, greedily, after each row's prompt, up to the end of the line."""
    if not len(rows):
        return []
    pieces = [recipe.template.pieces(row, tokenizer) for row in rows]
    prompts, wanted = ["".join(text for text, _ in row[:-1]) for row in pieces], [row[-1][0] for row in pieces]
    inputs = tokenizer(
        prompts,
        add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
    ).to(model.device)  # fmt: skip
    longest = 2 * max(len(ids) for ids in tokenizer(wanted).input_ids)
    written = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=longest, do_sample=False
    )
    texts = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [
        {
            "prompt": prompt.removeprefix(tokenizer.bos_token or ""),
            "reference": reference.strip(),
            "output": (text.strip() or "–").split("\n")[0],
        }
        for prompt, reference, text in zip(prompts, wanted, texts, strict=True)
    ]
