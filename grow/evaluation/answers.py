"""Scores what a model writes as an answer: whether it still answers, and in the form that was asked for.

The likelihood of a known answer cannot show that a fine-tuned model writes something else, such as its new task's form
of an answer; greedy decoding does.
"""

import re
from dataclasses import dataclass
from typing import Any

from grow.data.template import Template
from grow.evaluation.bootstrap import interval
from grow.evaluation.generation import generate


@dataclass(frozen=True)
class Answers:
    """Says how answers are written: greedily, at most so many `tokens`, after so many `shots`, other rows of the set
    with their answers."""

    tokens: int = 8
    shots: int = 0

    def score(self, model: Any, tokenizer: Any, template: Template, rows: Any) -> dict[str, Any]:
        """Returns `exact_match`, the share of rows whose written answer, up to the line's end, is the row's own, and
        `begins`, the share in which it begins with it; case, and punctuation at the end, do not count. With `rows`, how
        many were scored, their `intervals`, and `outputs`, what was written.

        The last rows are the shots, which are not scored.
        """
        count = len(rows) - self.shots
        shown = [rows[index] for index in range(count, len(rows))]
        written = generate(model, tokenizer, after(shown, template), rows.select(range(count)), self.tokens)
        exact = [float(_same(row["output"]) == _same(row["reference"])) for row in written]
        begins = [float(_begins(row["output"], row["reference"])) for row in written]
        return {
            "exact_match": sum(exact) / count,
            "begins": sum(begins) / count,
            "rows": count,
            "tokens": self.tokens,
            "shots": self.shots,
            "intervals": {"exact_match": interval(exact), "begins": interval(begins)},
            "outputs": [row["output"] for row in written],
        }


def after(shown: list[dict[str, Any]], template: Template) -> Template:
    """Returns a template whose prompts have rows with their answers before them."""
    texts = [template.fill(template.prompt, row) + template.fill(template.completion, row) for row in shown]
    gap = "\n\n" if any("\n" in text for text in texts) else "\n"
    before = "".join(text + gap for text in texts).replace("{", "{{").replace("}", "}}")
    return Template(before + template.prompt, template.completion)


def _same(text: str) -> str:
    return text.strip().rstrip(".,;:!?").casefold()


def _begins(text: str, reference: str) -> bool:
    return re.match(re.escape(_same(reference)) + r"(?!\w)", text.strip().casefold()) is not None
