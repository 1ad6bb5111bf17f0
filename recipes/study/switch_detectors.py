"""Which detector a switch should have, and where it ends: near sets, and what should open, on the real 270M.

    python recipes/gemma3_270m/fetch.py model translation capitals qa_wikidata winowhy prose german code
    python recipes/gemma3_270m/fetch.py translation_elsewhere
    python recipes/study/switch_detectors.py --out results [--layers 6,14] [--rows 100] [--tuned CHECKPOINT]

Every detector is fitted on the same rows (grow.switch.rows), as `fit-switch` does it: half of the task's prompts and
their variations against half of what the base writes. Its threshold leaves 99 % of the other half of the task's open.
Then: the share of each set that opens. Near sets are the same sentences with another request, or text in one of the
languages; "should open" asks for the task in another way. Two detectors are shown 20 and 200 rows of near sets besides
(`--off`), and 200 of all sets but the one that is looked at. The squared hinge reads the end of the prompt in other
ways, and several layers; a checkpoint that was fine-tuned on the task (`--tuned`) gives the likelihood ratio. Writes
OUT/switch_detectors.json and .md.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from grow.checkpoint.files import write_json, write_text
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.writer import weights_checksum
from grow.cli.arguments import run_script
from grow.data.of_recipe import rows_of, template_of, tokenizer_of
from grow.data.tokens import encode_cached
from grow.data.writing import self_text
from grow.methods import read_recipe
from grow.model.features import looking_back, mlp_inputs
from grow.model.loading import compute_device, compute_dtype, load
from grow.switch.detector import auroc, fit, threshold
from grow.switch.fit import DECAY
from grow.switch.near import near_prompts
from grow.switch.rows import ON_ROWS, after_rows, other_rows, retention_prompts, spread, task_prompts, variations

RECIPE = Path(__file__).parents[1] / "gemma3_270m" / "translation.yaml"
FAR = ("capitals", "qa_wikidata", "winowhy", "prose", "german", "code")
NEAR: dict[str, str] = {
    "German": "English: {en}\nGerman:", "Spanish": "English: {en}\nSpanish:",
    "French to English": "French: {fr}\nEnglish:",
    "summary": "English: {en}\nSummary:", "question": "English: {en}\nQuestion: What is this about?\nAnswer:",
    "German after a row": "English: {before[en]}\nFrench: {before[fr]}\n\nEnglish: {en}\nGerman:",
    "English text": "{en}", "French text": "{fr}",
}  # fmt: skip
SHOULD_OPEN: dict[str, str] = {
    "as in the task": "English: {en}\nFrench:", "a space after": "English: {en}\nFrench: ",
    "a line end after": "English: {en}\nFrench:\n", "capital letters": "ENGLISH: {en}\nFRENCH:",
    "one line": "English: {en} French:", "a long text before": "{prose}\n\nEnglish: {en}\nFrench:",
    "an example before": "English: {before[en]}\nFrench: {before[fr]}\n\nEnglish: {en}\nFrench:",
    "an instruction before": "Translate the following sentence into French.\n\nEnglish: {en}\nFrench:",
    "other words 1": "Translate to French: {en}\n", "other words 2": "English: {en}\nTranslation into French:",
    "other words 3": "In French, \"{en}\" is",
}  # fmt: skip


OPEN = (*SHOULD_OPEN, "strings of other programs")
Look = Callable[[Tensor], Tensor]
"""Maps the features of a prompt's tokens, [tokens, h], to what is read at each of them."""


def _back(x_TH: Tensor) -> Tensor:
    return looking_back(x_TH, DECAY)


def _mean_of(tokens: int) -> Look:
    """A mean over the last tokens, all of equal weight."""

    def look(x_TH: Tensor) -> Tensor:
        total = x_TH.cumsum(0)
        total[tokens:] = total[tokens:] - total[:-tokens]
        return total / torch.arange(1, len(x_TH) + 1).clamp(max=tokens)[:, None]

    return look


OTHERWISE: dict[str, tuple[tuple[int, ...], Look]] = {
    "layer 6, the last token alone": ((6,), _mean_of(1)),
    "layer 6, mean of two tokens": ((6,), _mean_of(2)),
    "layer 6, mean of four tokens": ((6,), _mean_of(4)),
    "layer 6, mean of eight tokens": ((6,), _mean_of(8)),
    "layers 6, 10 and 14": ((6, 10, 14), _back),
}
"""How else the squared hinge reads: the end of the prompt, and layers side by side."""
SHOWN = 20, 200


def switch_detectors(out: str, layers: str = "6,14", rows: str = "100", tuned: str = "") -> None:
    """Writes the tables to the folder OUT, for these layers, with so many rows of each set."""
    count, recipe = int(rows), read_recipe(str(RECIPE))
    tokenizer = tokenizer_of(recipe)
    model = load(recipe.base_name, compute_dtype()).to(compute_device())
    own = self_text(lambda: model, tokenizer, weights_checksum(Checkpoint(recipe.base_name).shards))
    train = rows_of(recipe, recipe.train_split)
    examples = encode_cached(train, tokenizer, template_of(recipe), recipe.max_length).examples
    prompts = task_prompts(examples, ON_ROWS)
    task = prompts + [p for kind in variations(examples, prompts, own, tokenizer) for p in kind.prompts]
    near = after_rows(near_prompts(model, recipe, own, tokenizer), examples, tokenizer)
    sets, shown = _sets(recipe, tokenizer, count), _near_sets(recipe, tokenizer, train, max(SHOWN))
    found: dict[str, Any] = {"rows": count, "layers": {}}

    read: dict[tuple[int, int], list[Tensor]] = {}

    def features(of: list[list[int]], layers: tuple[int, ...], look: Look) -> list[Tensor]:
        for layer in layers:
            if (id(of), layer) not in read:
                read[id(of), layer] = mlp_inputs(model, of, layer)
        each = [[look(x) for x in read[id(of), layer]] for layer in layers]
        return [torch.cat(of_row, 1) for of_row in zip(*each, strict=True)]

    def judged(layers: tuple[int, ...], look: Look, detectors: dict[str, Fit]) -> tuple[dict[str, Any], Any]:
        def last(of: list[list[int]]) -> Tensor:
            return torch.stack([x[-1] for x in features(of, layers, look)])

        every, on_x, near_x = features(own, layers, look), last(task), last(near)
        sets_x, shown_x = ({name: last(of) for name, of in some.items()} for some in (sets, shown))
        off_x = [torch.cat([x[1:] for x in every[::2]]), near_x[::2]]
        held_out = on_x[1::2], torch.cat([torch.stack([x[-1] for x in every[1::2]]), near_x[1::2]])
        lines = {name: _judged(one(on_x[::2], off_x), *held_out, sets_x) for name, one in detectors.items()}
        return lines, (on_x, off_x, held_out, sets_x, shown_x)

    for layer in map(int, layers.split(",")):
        print(f"layer {layer}", file=sys.stderr, flush=True)
        lines, of_layer = judged((layer,), _back, DETECTORS)
        found["layers"][layer] = lines | _with_near_rows(*of_layer)
    found["otherwise"] = {}
    for name, (some, look) in OTHERWISE.items():
        print(name, file=sys.stderr, flush=True)
        ((_, line),) = judged(some, look, {"squared hinge": _squared_hinge})[0].items()
        found["otherwise"][f"squared hinge, {name}"] = line
    text = {name: [tokenizer.decode(p[1:]) for p in of] for name, of in sets.items()}
    on_text, off_text = ([tokenizer.decode(p[1:]) for p in of] for of in (task, own + near))
    found["prompt"] = _of_text(on_text, off_text, text)
    if tuned:
        found["prompt"]["likelihood ratio"] = _likelihood_ratio(
            model, tuned, (task[1::2], own[1::2] + near[1::2]), sets
        )
    write_json(Path(out) / "switch_detectors.json", found)
    write_text(Path(out) / "switch_detectors.md", tables(found))
    print(tables(found))


def _sets(recipe: Any, tokenizer: Any, count: int) -> dict[str, list[list[int]]]:
    """Returns the prompts of each set, in tokens."""
    test, train = rows_of(recipe, recipe.test_split), rows_of(recipe, recipe.train_split)
    folder = Path(recipe.data).parent
    prose = [row["text"] for row in rows_of(_of(recipe, folder / "prose"), "test")[:count]]
    found = _formatted(SHOULD_OPEN, test[:count], train, tokenizer, prose) | _near_sets(recipe, tokenizer, test, count)
    (known,) = (of.prompts for of in retention_prompts(recipe, tokenizer, count))
    others = {name: other_rows(f"{folder / name}[:{count}]", recipe, tokenizer) for name in FAR if name != "capitals"}
    elsewhere = rows_of(_of(recipe, folder / "translation_elsewhere"), "test")[:count]
    ids = [tokenizer(f"English: {row['en']}\nFrench:", add_special_tokens=False).input_ids for row in elsewhere]
    found["strings of other programs"] = [[tokenizer.bos_token_id, *own] for own in ids]
    return found | {"capitals": known} | others


def _near_sets(recipe: Any, tokenizer: Any, rows: Any, count: int) -> dict[str, list[list[int]]]:
    """Returns prompts of near sets, from rows of the task."""
    chosen = [rows[index] for index in spread(len(rows), count)]
    return _formatted(NEAR, chosen, rows_of(recipe, recipe.train_split), tokenizer)


def _formatted(
    forms: dict[str, str], rows: Any, train: Any, tokenizer: Any, prose: Sequence[str] = ("",)
) -> dict[str, list[list[int]]]:
    found = {}
    for name, form in forms.items():
        texts = [
            form.format(**row, before=train[7 * index], prose=prose[index % len(prose)][:600])
            for index, row in enumerate(rows)
        ]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        found[name] = [[tokenizer.bos_token_id, *own] for own in ids]
    return found


def _of(recipe: Any, folder: Path) -> Any:
    return read_recipe(str(RECIPE), {"data": str(folder)})


Scores = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, list[Tensor]], Scores]


def _squared_hinge(on: Tensor, off: list[Tensor]) -> Scores:
    return fit([on], off).scores


def _discriminant(on: Tensor, off: list[Tensor]) -> Scores:
    """Fisher's, with a ridge of 5 % of the mean variance; kinds count alike."""
    covariance = sum(torch.cov(x.double().T, correction=0) for x in (on, *off))
    assert isinstance(covariance, Tensor)
    covariance += 0.05 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    difference = on.double().mean(0) - torch.stack([x.double().mean(0) for x in off]).mean(0)
    weight = torch.linalg.solve(covariance, difference)
    return lambda x: x.double() @ weight


def _logistic(on: Tensor, off: list[Tensor]) -> Scores:
    x = torch.cat([on, *off]).double()
    scale = x.std(0) + 1e-6
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
    model.fit((x / scale).numpy(), [1] * len(on) + [0] * sum(map(len, off)))
    return lambda some: torch.from_numpy(model.decision_function((some.double() / scale).numpy()))


def _relative_mahalanobis(on: Tensor, off: list[Tensor]) -> Scores:
    """Ren et al. 2021 (arXiv 2106.09022): the distance to the base's own text less that to the task."""
    inside, outside = discriminant_parts(on), discriminant_parts(torch.cat(off))
    return lambda x: _distance(x, *outside) - _distance(x, *inside)


def discriminant_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and inverse covariance, with a ridge of 5 %."""
    x = x.double()
    covariance = torch.cov(x.T)
    ridge = 0.05 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    return x.mean(0), torch.linalg.inv(covariance + ridge)


def _distance(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    centred = x.double() - mean
    return (centred @ inverse * centred).sum(1)


def _cosine(on: Tensor, off: list[Tensor]) -> Scores:
    direction = on.double().mean(0) - torch.stack([x.double().mean(0) for x in off]).mean(0)
    return lambda x: torch.nn.functional.cosine_similarity(x.double(), direction[None])


DETECTORS: dict[str, Fit] = {
    "linear discriminant": _discriminant,
    "squared hinge": _squared_hinge,
    "logistic": _logistic,
    "relative Mahalanobis": _relative_mahalanobis,
    "cosine to the mean": _cosine,
}


def _judged(scores: Scores, on: Tensor, off: Tensor, sets: dict[str, Tensor]) -> dict[str, Any]:
    of_task, limit = scores(on), threshold(scores(on), scores(off))
    return {
        "opens_at_most": limit.opens_at_most,
        "open": {name: float((scores(x) > limit.value).double().mean()) for name, x in sets.items()},
        "auroc": {name: auroc(of_task, scores(x)) for name, x in sets.items() if name not in OPEN},
    }


def _with_near_rows(
    on: Tensor, off: list[Tensor], held_out: tuple[Tensor, Tensor], sets: dict[str, Tensor], shown: dict[str, Tensor]
) -> dict[str, Any]:
    """Returns two detectors shown some rows of each near set; and, of each near set, shown those of all others."""
    found: dict[str, Any] = {}
    for detector in ("linear discriminant", "squared hinge"):
        fit_one = DETECTORS[detector]
        for rows in SHOWN:
            fitted = fit_one(on[::2], [*off, *(x[:rows] for x in shown.values())])
            found[f"{detector}, {rows} rows of each near set"] = _judged(fitted, *held_out, sets)
        left_out = {}
        for name in NEAR:
            fitted = fit_one(on[::2], [*off, *(x for other, x in shown.items() if other != name)])
            left_out[name] = _judged(fitted, *held_out, {name: sets[name]})["open"][name]
        found[f"{detector}, all near sets but this one"] = {"open": left_out, "auroc": {}}
    return found


def _of_text(on: list[str], off: list[str], sets: dict[str, list[str]]) -> dict[str, Any]:
    """Returns two humble rivals, which read the prompt's text: a regular expression, and n-grams of characters."""
    pattern = re.compile(r"(?s).*English: .*\nFrench:\s*")
    vectors = HashingVectorizer(analyzer="char", ngram_range=(1, 4), n_features=2**16)
    model = LogisticRegression(C=10, class_weight="balanced", max_iter=2000)
    model.fit(vectors.transform(on[::2] + off[::2]), [1] * len(on[::2]) + [0] * len(off[::2]))

    def scores(texts: list[str]) -> Tensor:
        return torch.from_numpy(model.decision_function(vectors.transform(texts)))

    limit = threshold(scores(on[1::2]), scores(off[1::2]))
    return {
        "regular expression": {
            "open": {n: sum(bool(pattern.fullmatch(t)) for t in texts) / len(texts) for n, texts in sets.items()}
        },
        "n-grams of the prompt": {
            "opens_at_most": limit.opens_at_most,
            "open": {n: float((scores(texts) > limit.value).double().mean()) for n, texts in sets.items()},
        },
    }


def _likelihood_ratio(
    base: Any, tuned: str, held_out: tuple[list[list[int]], list[list[int]]], sets: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """Returns the log-likelihood of a prompt under a fine-tuned model less that under the base, a token (arXiv
    2404.08679), as a detector. It costs a whole pass of both models."""
    after = load(tuned, compute_dtype()).to(compute_device())

    @torch.no_grad()
    def scores(prompts: list[list[int]]) -> Tensor:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=base.device)
            each = [m(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).float() for m in (after, base)]
            own = [x.gather(1, ids[0, 1:, None]).mean() for x in each]
            found.append(own[0] - own[1])
        return torch.stack(found).cpu()

    on, off = map(scores, held_out)
    limit = threshold(on, off)
    named = {name: scores(of) for name, of in sets.items()}
    return {
        "opens_at_most": limit.opens_at_most,
        "open": {name: float((x > limit.value).double().mean()) for name, x in named.items()},
        "auroc": {name: auroc(on, x) for name, x in named.items() if name not in OPEN},
    }


def tables(found: dict[str, Any]) -> str:
    """Returns the shares that open, in percent, as Markdown tables: what should, near sets, far sets."""
    rows = [
        (f"{name}, layer {layer}", line) for layer, lines in found["layers"].items() for name, line in lines.items()
    ]
    rows += [*found["otherwise"].items(), *found["prompt"].items()]
    text = []
    for title, names in (("should open", OPEN), ("near", NEAR), ("far", FAR)):
        lines = [f"| {title}: % open | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for name, line in rows:
            cells = [f"{100 * line['open'][one]:.0f}" if one in line["open"] else "" for one in names]
            lines += [f"| {name} | " + " | ".join(cells) + " |"] if any(cells) else []
        text.append("\n".join(lines))
    lines = ["| AUROC, task against the set | " + " | ".join(NEAR) + " | lowest of the far sets |"]
    lines.append("|---" * (len(NEAR) + 2) + "|")
    for name, line in rows:
        areas = line.get("auroc") or {}
        if areas:
            lowest = min(areas[one] for one in FAR)
            lines.append(f"| {name} | " + " | ".join(f"{areas[one]:.3f}" for one in NEAR) + f" | {lowest:.3f} |")
    text.append("\n".join(lines))
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    run_script(switch_detectors, str(__doc__))
