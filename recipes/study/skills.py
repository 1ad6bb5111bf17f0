"""Two skills on one base: English to French and entailment, together in every way that is known.

    python recipes/study/run.py recipes/study/switch.yaml --seeds 1 --keep            # the runs that are combined
    python recipes/study/run.py recipes/study/switch_entailment.yaml --seeds 1 --keep
    python recipes/study/skills.py --out results --growth french=GROWN,entailment=GROWN
        --sft french=STOCK,entailment=STOCK --lora french=RUN/result,entailment=RUN/result

Growth: two packages on one base, with their switches and always on. Task arithmetic (arXiv 2212.04089): the base and
the sum of both fine-tunings' changes, times λ. LoRAs: PEFT's sum (`cat`) and TIES (arXiv 2306.01708). Each is scored on
both tasks and on retention. Writes OUT/skills.json and .md; what is scored already is not scored again.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from commands import arguments, grow
from grid import read_grid
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grow.analysis.figures import markdown
from grow.checkpoint.files import write_json, write_text
from grow.checkpoint.shards import read_json
from grow.checkpoint.switch_record import NAME as SWITCH_NAME
from grow.cli.arguments import run_script
from grow.errors import UserError
from grow.methods import read_recipe

HERE = Path(__file__).parent
TASKS = {"french": "switch.yaml", "entailment": "switch_entailment.yaml"}
_SUMS = (0.5, 0.75, 1.0)
_ROWS, _RETENTION = 100, 30


def skills(out: str, growth: str, sft: str, lora: str) -> None:
    """Scores every combination of the two tasks' results."""
    cache = Path(os.environ.setdefault("GROW_CACHE", os.path.expanduser("~/.cache/grow")))
    folder, results = cache / "study" / "skills", Path(out) / "skills.json"
    folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    grids = {name: HERE / grid for name, grid in TASKS.items()}
    recipes = {name: str((path.parent / read_grid(path)["recipe"]).resolve()) for name, path in grids.items()}
    base = read_recipe(recipes["french"]).base
    found = read_json(results) if results.exists() else {}
    made = folder / "made"
    for name, (make, options) in _combinations(base, *map(_named, (growth, sft, lora))).items():
        if name not in found:
            shutil.rmtree(made, ignore_errors=True)
            checkpoint = make(made)
            found[name] = {
                task: _scored(recipe, grids[task], checkpoint, folder / "scores.json", options)
                for task, recipe in recipes.items()
            }
            write_json(results, found)
    shutil.rmtree(made, ignore_errors=True)
    write_text(Path(out) / "skills.md", table(found))
    print(table(found))


def _named(text: str) -> dict[str, Path]:
    """Reads "french=FOLDER,entailment=FOLDER"."""
    found = {name: Path(folder) for name, _, folder in (part.partition("=") for part in text.split(","))}
    if found.keys() != TASKS.keys():
        raise UserError(f"{text}: name a folder for each of {', '.join(TASKS)}")
    return found


def _combinations(
    base: str, growth: dict[str, Path], sft: dict[str, Path], lora: dict[str, Path]
) -> dict[str, tuple[Callable[[Path], str | Path], list[str]]]:
    """Returns for each model, by name, what makes it, given a folder to write to, and the options of `eval`."""
    stock = ["--start", base]
    found: dict[str, tuple[Callable[[Path], str | Path], list[str]]] = {"base": (partial(_as_it_is, Path(base)), [])}

    def grown(out: Path) -> Path:
        packages = {name: out.with_name(f"{name}-package") for name in growth}
        for name, package in packages.items():
            shutil.rmtree(package, ignore_errors=True)
            grow("growth", growth[name], package)
        grow("attach", base, *(f"{name}={package}" for name, package in packages.items()), out)
        return out

    for name, own in growth.items():
        found[f"growth, {name} alone, its switch"] = (partial(_as_it_is, own), [])
    found["growth, both, their switches"] = (grown, [])
    found["growth, both, always on"] = (grown, ["--switch", "on"])
    for name, own in sft.items():
        found[f"SFT, {name} alone"] = (partial(_as_it_is, own), stock)
    for share in _SUMS:
        make = partial(_task_arithmetic, base, list(sft.values()), share)
        found[f"SFT, both: task arithmetic, λ = {share:g}"] = (make, stock)
    for name, own in lora.items():
        has_switch = (own / SWITCH_NAME).exists()
        found[f"LoRA, {name} alone"] = (partial(_as_it_is, own), ["--switch", "on"] if has_switch else [])
    ways: dict[str, dict[str, Any]] = {
        "sum": {"combination_type": "cat"},
        "TIES, half kept": {"combination_type": "ties", "density": 0.5},
    }
    for way, settings in ways.items():
        found[f"LoRA, both: {way}"] = (partial(_by_peft, base, lora, settings), stock)
    return found


def _as_it_is(checkpoint: Path, _: Path) -> Path:
    return checkpoint


def _task_arithmetic(base: str, trained: list[Path], share: float, out: Path) -> Path:
    """Writes base + share · Σ (trained − base), computed in fp32."""
    before = _tensors(Path(base))
    total = {name: tensor.float() for name, tensor in before.items()}
    for path in trained:
        for name, tensor in _tensors(path).items():
            total[name] += share * (tensor.float() - before[name].float())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict({name: tensor.to(before[name].dtype) for name, tensor in total.items()}, strict=False)
    return _write(model, base, out)


def _by_peft(base: str, loras: dict[str, Path], settings: dict[str, Any], out: Path) -> Path:
    """Writes the base with a combination of LoRAs that PEFT makes, merged."""
    (first, path), *others = loras.items()
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    with torch.no_grad():
        model.add_weighted_adapter(list(loras), [1.0] * len(loras), "both", **settings)
    model.set_adapter("both")
    return _write(model.merge_and_unload(), base, out)


def _write(model: Any, base: str, out: Path) -> Path:
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def _scored(recipe: str, grid: Path, checkpoint: str | Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Returns a checkpoint's scores on one task, and on retention."""
    fields = {
        name: value for name, value in read_grid(grid)["fields"].items() if name != "metric"
    }  # nothing is written
    grow(
        "eval", checkpoint, "--recipe", recipe, "--out", out, f"--limit={_ROWS}", f"--retention-limit={_RETENTION}",
        *arguments(fields), *options,
    )  # fmt: skip
    result = json.loads(out.read_text())
    sets = {"capitals": result["retention"], **result["retention_sets"]}
    keys = ("loss", "accuracy", "kl", "identical", "opened", "rows")
    found: dict[str, Any] = {"task": {key: result["task"][key] for key in keys if key in result["task"]}}
    found["retention"] = {name: {key: s[key] for key in keys if key in s} for name, s in sets.items()}
    return found


def table(found: dict[str, Any]) -> str:
    """Returns a row for each combination: both tasks, and what is left of the base."""
    header = ["", "French, loss", "entailment, loss", "accuracy", "KL(base ‖ model), text", "worst set", "identical"]
    rows = []
    for name, scores in found.items():
        sets = scores["french"]["retention"]
        row = [name, f"{scores['french']['task']['loss']:.3f}", f"{scores['entailment']['task']['loss']:.3f}"]
        row.append(f"{scores['entailment']['task']['accuracy']:.1%}")
        if name == "base":
            row += ["0", "", "all"]
        else:
            text = sum(sets[one]["kl"] for one in ("prose", "german", "code")) / 3
            worst = max(sets, key=lambda one: sets[one]["kl"])
            same = sum(s["identical"] * s["rows"] for s in sets.values())
            row += [f"{text:.4f}", f"{worst} {sets[worst]['kl']:.4f}"]
            row += [f"{same:.0f} of {sum(s['rows'] for s in sets.values())}"]
        rows.append(row)
    return markdown(header, rows)


if __name__ == "__main__":
    run_script(skills, str(__doc__))
