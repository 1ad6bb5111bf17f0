"""Does a switch read the content, where the template gives nothing away? Word problems among other questions.

    python recipes/gemma3_270m/fetch.py model maths capitals qa_wikidata winowhy entailment translation
    python recipes/study/switch_template.py --out results [--layers 6,12]

Everything stands in one template, "Question: … Answer:". The skill is MathQA, whose odd spacing is taken out; other
sets are not the skill. A switch is fitted as `fit-switch` does it, without and with 20 rows of each of the other sets
(`--off`), and with 20 rows of all but the one that is looked at. Writes OUT/switch_template.json and .md.
"""

import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grow.analysis.figures import markdown
from grow.checkpoint.files import write_json, write_text
from grow.cli.arguments import run_script
from grow.data.of_recipe import tokenizer_of
from grow.methods import read_recipe
from grow.model.features import opens
from grow.model.loading import compute_device, compute_dtype, load
from grow.switch.fit import fit_switch
from grow.switch.rows import Prompts

RECIPE = Path(__file__).parents[1] / "gemma3_270m" / "maths.yaml"
TEMPLATE = "Question: {question}\nAnswer:"
_ROWS, _SHOWN = 100, 20


def switch_template(out: str, layers: str = "6,12") -> None:
    """Writes the table to the folder OUT, for switches that read these layers."""
    source = read_recipe(str(RECIPE))
    model = load(source.base_name, compute_dtype()).to(compute_device())
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "validation", "test"):
            rows = [json.loads(line) for line in Path(source.data, f"{split}.jsonl").read_text().splitlines()]
            lines = (json.dumps(row | {"question": plain(row["question"])}) for row in rows)
            Path(folder, f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        recipe = read_recipe(str(RECIPE), {"data": folder, "prompt": TEMPLATE})
        tokenizer = tokenizer_of(recipe)
        test = [json.loads(line)["question"] for line in Path(folder, "test.jsonl").read_text().splitlines()]
        texts = {"word problems": test, **dict(_others(Path(source.data).parent))}
        sets = {
            name: [[tokenizer.bos_token_id, *tokenizer(TEMPLATE.format(question=text), add_special_tokens=False)
                    .input_ids] for text in some[: _ROWS + _SHOWN]]
            for name, some in texts.items()
        }  # fmt: skip
        others = {name: Prompts(name, of[_ROWS:]) for name, of in sets.items() if name != "word problems"}
        found: dict[str, dict[str, float]] = {}
        for layer in map(int, layers.split(",")):
            shown: dict[str, list[Prompts]] = {"": [], f", {_SHOWN} rows of each other set": list(others.values())}
            for name, off in shown.items():
                record = fit_switch(model, recipe, "row", layer, off=off)
                found[f"layer {layer}{name}"] = {
                    one: sum(opens(model, record, of[:_ROWS])) / _ROWS for one, of in sets.items()
                }
            left_out = {}
            for one in others:
                record = fit_switch(model, recipe, "row", layer, off=[o for name, o in others.items() if name != one])
                left_out[one] = sum(opens(model, record, sets[one][:_ROWS])) / _ROWS
            found[f"layer {layer}, {_SHOWN} rows of each set but this one"] = left_out
            write_json(Path(out) / "switch_template.json", found)
    write_text(Path(out) / "switch_template.md", table(found))
    print(table(found))


def plain(text: str) -> str:
    """Returns a word problem of MathQA with the spaces and capitals that text has."""
    text = re.sub(r" ([,.?;:!%)])", r"\1", text.strip())
    text = re.sub(r"([($]) ", r"\1", text).replace(" ' ", "'").replace(" - ", "-")
    return text[:1].upper() + text[1:]


def _others(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields sets of texts that are not the skill."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name / "test.jsonl").read_text().splitlines()]

    yield "qa_wikidata", [row["prompt"] for row in rows("qa_wikidata")]
    yield "winowhy", [row["prompt"] for row in rows("winowhy")]
    yield "capitals", [f"What is the capital of {row['country']}?" for row in rows("capitals")]
    yield "claims", [f"{row['evidence']} Is it so that {row['claim']}" for row in rows("entailment")]
    yield "interface strings", [row["en"] for row in rows("translation")]
    draw = random.Random(0)
    yield "arithmetic", [f"What is {draw.randint(10, 99)} + {draw.randint(10, 99)}?" for _ in range(_ROWS + _SHOWN)]


def table(found: dict[str, dict[str, float]]) -> str:
    """Returns the shares that open, in percent."""
    names = list(next(iter(found.values())))
    rows = [[name, *(f"{100 * line[one]:.0f}" if one in line else "" for one in names)] for name, line in found.items()]
    return markdown(["% open", *names], rows)


if __name__ == "__main__":
    run_script(switch_template, str(__doc__))
