"""Two skills on one base: English to French and entailment, together in every way that is known.

    python recipes/study/run.py recipes/study/switch.yaml --seeds 1 --keep            # the runs that are combined
    python recipes/study/run.py recipes/study/switch_entailment.yaml --seeds 1 --keep
    python recipes/study/skills.py --out results [--seed 1]

Growth: two packages on one base, with their switches and always on. Task arithmetic (arXiv 2212.04089): the base and
the sum of both fine-tunings' changes, times λ. LoRAs: PEFT's sum (`cat`) and TIES (arXiv 2306.01708). Each is scored on
both tasks and on retention. Writes OUT/skills.json and .md; what is scored already is not scored again.
"""

import json
import os
import shutil
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
from grow.cli.arguments import run_script
from grow.methods import read_recipe

HERE = Path(__file__).parent
TASKS = {"french": "switch.yaml", "entailment": "switch_entailment.yaml"}
_SUMS = (0.5, 0.75, 1.0)
_RETENTION = 100


def skills(out: str, seed: str = "1", work: str = "") -> None:
    """Scores every combination of the two tasks' runs with this seed."""
    cache = Path(os.environ.setdefault("GROW_CACHE", os.path.expanduser("~/.cache/grow")))
    folder, results = Path(work or cache / "study" / "skills"), Path(out) / "skills.json"
    folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    runs = {
        name: _Runs(cache / "study" / grid.removesuffix(".yaml"), HERE / grid, seed) for name, grid in TASKS.items()
    }
    base = runs["french"].base
    found = read_json(results) if results.exists() else {}
    made = folder / "made"
    for name, (make, options) in _combinations(base, runs).items():
        if name in found:
            continue
        shutil.rmtree(made, ignore_errors=True)
        checkpoint = make(made)
        found[name] = {
            task: _scored(own, checkpoint, folder / "scores.json", options, task == "french")
            for task, own in runs.items()
        }
        write_json(results, found)
    shutil.rmtree(made, ignore_errors=True)
    write_text(Path(out) / "skills.md", table(found))
    print(table(found))


class _Runs:
    """Knows the runs of one task's grid with one seed."""

    def __init__(self, work: Path, grid: Path, seed: str):
        self.work, self.grid, self.seed = work, read_grid(grid), seed
        self.recipe = str((grid.parent / self.grid["recipe"]).resolve())
        self.base = read_recipe(self.recipe, self.grid["fields"]).base

    def folder(self, label: str, end: str = "") -> Path:
        """Returns the folder of a row's run, at the row's first rate, or what it was consolidated to."""
        rate = float(self.grid["methods"][label]["learning_rate"][0])
        return self.work / f"{label} {rate:g} seed {self.seed}{end}".replace(" ", "-")


def _combinations(base: str, runs: dict[str, _Runs]) -> dict[str, Any]:
    """Returns for each model, by name, what makes it, given a folder to write to, and the options of `eval`."""
    stock = ["--start", base]
    found: dict[str, Any] = {"base": (lambda _: base, [])}

    def grown(out: Path) -> Path:
        both = [f"{name}={own.folder('g_freeze upper', '-package')}" for name, own in runs.items()]
        for own in runs.values():
            package = own.folder("g_freeze upper", "-package")
            if not package.exists():
                grow("growth", own.folder("g_freeze upper", "-trained"), package)
        grow("attach", base, *both, out)
        return out

    for name, own in runs.items():
        trained = own.folder("g_freeze upper", "-trained")
        found[f"growth, {name} alone, its switch"] = (lambda _, trained=trained: trained, [])
    found["growth, both, their switches"] = (grown, [])
    found["growth, both, always on"] = (grown, ["--switch", "on"])
    changes = {name: own.folder("sft", "-trained") for name, own in runs.items()}
    for name, trained in changes.items():
        found[f"SFT, {name} alone"] = (lambda _, trained=trained: trained, stock)
    for share in _SUMS:
        found[f"SFT, both: task arithmetic, λ = {share:g}"] = (
            lambda out, share=share: _task_arithmetic(base, list(changes.values()), share, out),
            stock,
        )
    loras = {name: own.folder("lora all") / "result" for name, own in runs.items()}
    for name, own_lora in loras.items():
        found[f"LoRA, {name} alone"] = (lambda _, lora=own_lora: lora, ["--switch", "on"])
    ways: dict[str, dict[str, Any]] = {
        "sum": {"combination_type": "cat"},
        "TIES, half kept": {"combination_type": "ties", "density": 0.5},
    }
    for way, settings in ways.items():
        found[f"LoRA, both: {way}"] = (lambda out, s=settings: _by_peft(base, loras, out, s), stock)
    return found


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


def _by_peft(base: str, loras: dict[str, Path], out: Path, settings: dict[str, Any]) -> Path:
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


def _scored(own: _Runs, checkpoint: Any, out: Path, options: list[str], retention: bool) -> dict[str, Any]:
    """Returns a checkpoint's scores on one task, and on retention, of a row a set where it is scored elsewhere."""
    fields = {name: value for name, value in own.grid["fields"].items() if name != "metric"}  # nothing is written
    grow(
        "eval", checkpoint, "--recipe", own.recipe, "--out", out, f"--limit={own.grid['limit']}",
        f"--retention-limit={_RETENTION if retention else 1}", *arguments(fields), *options,
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
