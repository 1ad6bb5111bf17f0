"""Shows what a run would train on, row by row, before any model is loaded."""

from typing import Any

from grow.data.encoder import Encoder
from grow.data.of_recipe import rows_of, template_of, tokenizer_of
from grow.data.packing import PackedDataset, summary
from grow.data.tokenizer import pad_token_id
from grow.data.tokens import encode_cached
from grow.errors import UserError
from grow.recipe import Recipe

_COLOUR, _PLAIN = ("\033[1;32m", "\033[0m"), ("⟦", "⟧")
_AROUND_A_BORDER = 3


def preview(recipe: Recipe, split: str, limit: int) -> dict[str, Any]:
    """Returns the first `limit` rows of a split as they would be learnt (0: all), and a summary of all of them.

    Each entry of "rows" has `row`, its index, and either `text`, `learnt` (the part of the text with labels), `spans`
    (the same as characters of the text), `tokens` (how many) and `borders` (the tokens around each place where learning
    begins or ends), or `bad`, why it cannot be used. Raises UserError as a run would, except for bad rows.
    """
    tokenizer, rows = tokenizer_of(recipe), rows_of(recipe, split)
    encoded = encode_cached(rows, tokenizer, template_of(recipe), recipe.max_length)
    bad = {row: reason for reason, some in encoded.bad.items() for row in some}
    encoder = Encoder(tokenizer, template_of(recipe))
    shown = range(min(limit or len(rows), len(rows)))
    found = [{"row": row, "bad": bad[row]} if row in bad else _row(row, rows[row], encoder) for row in shown]
    result = {"data": recipe.data, "split": split, "rows": found, "of": len(rows), "bad_rows": len(bad)}
    if bad:
        result["reasons"] = encoded.reasons()
    if encoded.examples:
        sequences = PackedDataset(encoded.examples, recipe.max_length, pad_token_id(tokenizer), recipe.seed)
        tokens, labels = encoded.examples.counts()
        result |= {"tokens": tokens, "labels": labels, "sequences": len(sequences), "summary": summary(sequences)}
    return result


def _row(index: int, row: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    shown = encoder.shown(row)
    names = [str(name) for name in encoder.tokenizer.convert_ids_to_tokens(shown.ids)]
    text = "".join(shown.text[begin:end] for begin, end in shown.spans)
    turns = [i for i in range(1, len(shown.learnt)) if shown.learnt[i] != shown.learnt[i - 1]]
    borders = [[names[max(0, i - _AROUND_A_BORDER) : i], names[i : i + _AROUND_A_BORDER]] for i in turns]
    return {"row": index, "text": shown.text, "learnt": text, "spans": shown.spans, "tokens": len(shown.ids) - 1,
            "borders": borders}  # fmt: skip


def preview_text(result: dict[str, Any], colour: bool) -> str:
    """Writes a preview for a person: what is learnt is in colour, or between ⟦ and ⟧."""
    on, off = _COLOUR if colour else _PLAIN
    lines = []
    for row in result["rows"]:
        if "bad" in row:
            lines.append(f"row {row['row']}: cannot be used: {row['bad']}")
            continue
        parts, done = [], 0
        for begin, end in row["spans"]:
            parts += [row["text"][done:begin], on, row["text"][begin:end], off]
            done = end
        borders = "; ".join(f"{_visible(before)} | {_visible(after)}" for before, after in row["borders"])
        lines += [
            f"row {row['row']}, {row['tokens']} tokens; borders: {borders}",
            "".join(parts) + row["text"][done:],
            "",
        ]
    if result["bad_rows"]:
        lines.append(f"{result['bad_rows']} of {result['of']} rows cannot be used: {result['reasons']}")
    lines.append(f"{result['data']}, {result['split']}: {result.get('summary', 'no row that can be used')}")
    return "\n".join(lines)


def _visible(tokens: list[str]) -> str:
    return " ".join(token.encode("unicode_escape").decode() if not token.isprintable() else token for token in tokens)


def checked_limit(limit: int) -> int:
    """Returns the number of rows to show. Raises UserError if it is negative."""
    if limit < 0:
        raise UserError(f"--limit {limit}: 0 is all, or a number above it")
    return limit
