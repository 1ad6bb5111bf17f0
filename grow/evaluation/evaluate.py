"""Scores a checkpoint on the recipe's task and on retention: held-out rows, at any α.

Each figure comes with its number of rows and a 95 % interval by the bootstrap over rows. Contaminated rows
(grow.data.decontamination) are counted and left out.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from xxhash import xxh3_64_hexdigest

from grow.data.decontamination import contaminated
from grow.data.examples import Examples
from grow.data.of_recipe import (
    mixed_rows,
    retention_rows,
    retention_template,
    rows_of,
    sliced,
    template_of,
    with_images,
)
from grow.data.template import Template
from grow.data.tokenizer import load_tokenizer
from grow.data.tokens import encode
from grow.errors import UserError, one_line
from grow.evaluation.answers import Answers
from grow.evaluation.bootstrap import interval
from grow.evaluation.generation import generate, translation_scores
from grow.evaluation.interpolation import Interpolation, check_alphas
from grow.evaluation.scoring import choices, right_options, score
from grow.model.switched import check_mode
from grow.recipe import Recipe


@dataclass
class Items:
    """Holds rows that are scored as one set: `rows` (grow.data.rows.Rows), `examples` of the same in tokens; and how
    many were left out, because training rows contaminate them or because they cannot be used."""

    name: str
    rows: Any
    template: Template
    examples: Examples
    contaminated: int
    unusable: int

    @property
    def fingerprint(self) -> str:
        """Returns what tells these rows from others."""
        return xxh3_64_hexdigest(repr([(example.input_ids, example.labels) for example in self.examples]).encode())


def evaluate(
    path: str,
    recipe: Recipe | None,
    alphas: tuple[float, ...] = (1.0,),
    samples: int = 0,
    limit: int | None = None,
    retention_limit: int | None = None,
    start: str = "",
    against: dict[str, Any] | None = None,
    harness: Callable[[Any, Any], dict[str, Any]] | None = None,
    switch: str = "auto",
    answers: Answers | None = None,
) -> dict[str, Any]:
    """Scores one checkpoint, stock, grown or an adapter's folder, at each α.

    The result has "task" (test rows), "retention" (rows of what the base knew) and "retention_sets" (more of these, by
    name), each with: `loss`, nats per labelled token; `token_accuracy`, the share of labelled tokens that are the
    likeliest; `exact_match`, the share of rows in which all are, which is what greedy decoding would give;
    `log_likelihood`, nats per row, the mean over rows; where the base is known, `kl`, KL(base ‖ model) of the next
    token, nats, the mean over labels, and `identical`, the share of rows whose logits at labels are the base's bit for
    bit; `opened`, the share of rows that a switch opened for; `rows`; `contaminated`, how many were left out;
    `intervals` of the figures; `items`, each row's log-likelihood, `label_items`, its labels, `kl_items`, its KL summed
    over them, `identical_items` and `opened_items`, 1 where it is so; `unusable`, how many rows could not be scored.
    The task also has the recipe's `metric`. "samples" has what the model writes for the first test rows, "failed" the
    parts that failed. For several α, "by_alpha" has all that for each, and the rest is that of the largest.

    `start` is the base of a stock checkpoint, to interpolate with. `against` is an earlier result, of the base:
    retention is compared with that, or with α = 0 where it is among the α, row by row (`from_base`). `harness` is given
    model and tokenizer, and its result stands under "lm_eval"; the recipe may be None then. `switch` sets the model's:
    "auto", "on" or "off". With `answers`, each retention set of questions also has `generation`, what
    grow.evaluation.answers.Answers.score returns.
    """
    check_alphas(path, start, alphas)
    check_mode(switch)
    tokenizer = load_tokenizer(path)
    sets = _items(recipe, tokenizer, limit, retention_limit) if recipe else []
    if recipe and recipe.options:
        right_options(sets[0].rows, recipe)  # a mistake in them is found before anything is loaded
    shots = answers.shots if answers else 0
    for items in sets[1:]:
        if items.template.prompt and len(items.rows) <= shots:
            raise UserError(f"--shots {shots}: {items.name} has {len(items.rows)} rows; give fewer shots")
    if against:
        against = _base_of(against)
        _check_base(against, sets)
    interpolation = Interpolation(path, start, switch)
    points: list[dict[str, Any]] = []
    for alpha in sorted(set(alphas)):
        interpolation.set(alpha)
        point: dict[str, Any] = {"checkpoint": path, "alpha": alpha, "dtype": str(interpolation.model.dtype)}
        parts = Parts(point)
        if recipe:
            _scores(parts, interpolation, recipe, tokenizer, sets, samples)
            if answers:
                for items in sets[1:]:
                    _add_answers(parts, answers, interpolation.model, tokenizer, items)
        if harness:
            parts.add("lm_eval", lambda: harness(interpolation.model, tokenizer))
        points.append(point)
        base = points[0] if points[0]["alpha"] == 0 else against
        if base is not None:
            _compare(point, base)
    return points[-1] | ({"by_alpha": points} if len(points) > 1 else {})


class Parts:
    """Collects the parts of a result, each of which may fail without the others, so that their scores are not lost."""

    def __init__(self, point: dict[str, Any]):
        self.point = point

    def add(self, name: str, make: Callable[[], Any], among: str = "") -> None:
        """Puts the value of `make` under its name, or inside `among`; if it fails, the reason goes under "failed"."""
        try:
            made = make()
        except Exception as error:
            mistake = isinstance(error, UserError)
            line = one_line(error) if mistake else f"{type(error).__name__}: {one_line(error)[:300]}"
            self.point.setdefault("failed", {})[name] = {"line": line, "mistake": mistake}
            return
        (self.point.setdefault(among, {}) if among else self.point)[name] = made


def _scores(
    parts: Parts, interpolation: Interpolation, recipe: Recipe, tokenizer: Any, sets: list[Items], samples: int
) -> None:
    task, *known = sets
    parts.add("task", lambda: _summary(interpolation, task, recipe, tokenizer))
    if recipe.metric != "loss" and "task" in parts.point:
        parts.add(recipe.metric, lambda: _add_metric(parts.point["task"], interpolation, task, recipe, tokenizer))
        parts.point.pop(recipe.metric, None)
    for items in known:
        among = "" if items.name == "retention" and recipe.retention else "retention_sets"
        parts.add(items.name, partial(_summary, interpolation, items, recipe, tokenizer), among)
    first = task.rows.select(range(min(samples, len(task.rows))))
    parts.add("samples", lambda: generate(interpolation.model, tokenizer, task.template, first))


def _add_answers(parts: Parts, answers: Answers, model: Any, tokenizer: Any, items: Items) -> None:
    """Adds what the model writes to a retention set's scores, if it has questions."""
    scores = known_sets(parts.point).get(items.name)
    if scores is not None and items.template.prompt:
        what = f"{items.name}, answers"
        parts.add(what, lambda: answers.score(model, tokenizer, items.template, items.rows))
        if what in parts.point:
            scores["generation"] = parts.point.pop(what)


def _items(recipe: Recipe, tokenizer: Any, limit: int | None, retention_limit: int | None) -> list[Items]:
    """Returns the task's rows first, then those of each retention set."""
    sets = [("task", rows_of(recipe, recipe.test_split), template_of(recipe), limit)]
    if recipe.retention:
        rows = retention_rows(recipe)
        sets.append(("retention", rows, retention_template(recipe, rows), retention_limit))
    for folder in recipe.retention_sets:
        rows = retention_rows(recipe, folder=folder)
        template = Template("", "{text}") if "text" in rows.columns(["text"]) else Template("{prompt}", "{completion}")
        path = sliced(folder)[0]
        name = path.rstrip("/").rpartition("/")[2]
        sets.append((name, rows, with_images(template, recipe, rows, path), retention_limit))
    if len({name for name, *_ in sets}) < len(sets):
        raise UserError(f"retention_sets: two of them have one name: {', '.join(name for name, *_ in sets)}")
    training = [(rows_of(recipe, recipe.train_split), template_of(recipe))]
    training += [(rows, template) for _, rows, template in mixed_rows(recipe)]
    held_out = [(rows, template) for _, rows, template, _ in sets]
    # Of each set, the rows that any training rows contaminate.
    shared = [set().union(*own) for own in zip(*(contaminated(held_out, one) for one in training), strict=True)]
    found = []
    for (name, rows, template, most), given_away in zip(sets, shared, strict=True):
        if not len(rows):
            raise UserError(f"no row to score for {name}: there is none at all")
        if len(given_away) == len(rows):
            print(
                f"{name}: all its {len(rows)} rows are in the training rows too; they are scored all the same, and say "
                "nothing of what was not learnt from",
                file=sys.stderr,
            )
            given_away = set()
        kept = rows.select([i for i in range(len(rows)) if i not in given_away][:most])
        # Retention rows get no end token: whether the answer comes is measured, not whether the text ends there.
        encoded = encode(kept, tokenizer, template, recipe.max_length, end=name == "task")
        bad = {row for some in encoded.bad.values() for row in some}
        if not encoded.examples:
            raise UserError(
                f"no row to score for {name}: {len(given_away)} of {len(rows)} overlap with training rows; of the "
                f"others {encoded.reasons()}"
            )
        if bad:
            print(f"{name}: {len(bad)} of {len(kept)} rows cannot be scored: {encoded.reasons()}", file=sys.stderr)
        kept = kept.select([i for i in range(len(kept)) if i not in bad])
        found.append(Items(name, kept, template, encoded.examples, len(given_away), len(bad)))
    return found


def _summary(interpolation: Interpolation, items: Items, recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    base = interpolation.base_logits if interpolation.has_base else None
    scores = score(interpolation.model, items.examples, recipe, tokenizer.pad_token_id, items.name, base).summary()
    if interpolation.alpha == 0:  # what a switch says has no effect
        scores = {key: value for key, value in scores.items() if not key.startswith("opened")}
    return scores | {
        "contaminated": items.contaminated,
        "unusable": items.unusable,
        "fingerprint": items.fingerprint,
    }


def _add_metric(
    scores: dict[str, Any], interpolation: Interpolation, task: Items, recipe: Recipe, tokenizer: Any
) -> None:
    more = _metric(interpolation, task, recipe, tokenizer)
    scores |= more | {"intervals": scores["intervals"] | more.get("intervals", {})}


def _metric(interpolation: Interpolation, task: Items, recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Returns the figures that the recipe's metric asks for beyond the loss, and their `intervals`."""
    if recipe.metric == "accuracy":
        return choices(interpolation.model, task.rows, recipe, tokenizer)
    if recipe.metric == "chrf":
        written = generate(interpolation.model, tokenizer, template_of(recipe), task.rows)
        return translation_scores([row["output"] for row in written], [row["reference"] for row in written])
    return {}


def known_sets(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the retention sets in a result, by name."""
    first = {"retention": scores["retention"]} if "retention" in scores else {}
    return first | scores.get("retention_sets", {})


def _base_of(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the base's scores in an earlier result, which is of the base itself or of several α.

    Raises UserError if α = 0 is not among these.
    """
    points = result.get("by_alpha") or result.get("dial") or []  # "dial" in files of before
    if not all(isinstance(point, dict) and "task" in point for point in points or [result]):
        raise UserError("--against: not a file that `grow eval --recipe … --out` wrote")
    base = next((point for point in points if point["alpha"] == 0), None)
    if points and base is None:
        raise UserError("--against: scores of several α without α = 0, which would be the base; score that")
    return base or result


def _check_base(base: dict[str, Any], sets: list[Items]) -> None:
    """Raises UserError, before anything is scored, if an earlier result is of other retention rows."""
    known = known_sets(base)
    if not known.keys() & {items.name for items in sets[1:]}:
        raise UserError("--against: has no scores of the retention rows that are scored here")
    for items in sets[1:]:
        if items.name in known and known[items.name].get("fingerprint") != items.fingerprint:
            raise UserError(
                f"--against: {items.name} was scored on other rows; score the base with the same recipe and limits"
            )


def _compare(point: dict[str, Any], base: dict[str, Any]) -> None:
    """Adds to each retention set how the log-likelihood of a row differs from the base's, row by row."""
    before = known_sets(base)
    for name, own in known_sets(point).items():
        if name in before:
            differences = [now - then for now, then in zip(own["items"], before[name]["items"], strict=True)]
            own["from_base"] = {
                "log_likelihood": sum(differences) / len(differences),
                "interval": interval(differences),
                "rows": len(differences),
            }
