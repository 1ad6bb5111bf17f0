"""How fast training is, as ratios within one run, beside stock transformers and TRL. Prints a table; tests nothing.

    python -m tests.benchmarks.training FOLDER [--size 270M|1B] [--only trainer,g_freeze] [--repeat 3] [--steps 24]
                                   [--scale 16]

Everyone takes the same rows of English and French, about eight a step (times `--scale`: a GPU wants more), in one
process on the same cores or the same GPU; 270M is the real Gemma 3 (recipes/gemma3_270m/fetch.py brings it), 1B its
larger sister's shape with random weights. Ours run as a user runs them: `grow train` with a recipe. The
rivals are in tests/benchmarks/rivals.py.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire
import torch
import yaml

from grow.checkpoint.run_folder import last_checkpoint
from grow.data.of_recipe import rows_of, template_of
from grow.data.tokens import encode
from grow.methods import read_recipe
from grow.model.loading import compute_dtype
from grow.recipe import Recipe
from tests.benchmarks.converter import words
from tests.helpers.tiny import ROOT

ROWS, PER_STEP, LENGTH = 96, 8, 256
"""At scale 1. LENGTH tokens hold about PER_STEP rows."""
WARMUP = ROWS // PER_STEP
"""The first time that the rows pass is not timed: until then the memory that a process keeps still grows."""
CHECKSUMS = {
    1: "59d45c7addadfc79b6d8de5ab942293535af72dee3344a6893e75a2c4bb95a30",
    16: "8fefca1b0f8d03cf348a49a31b3d03995ad914729b3afab9ebb02d9df5b9a03d",
}
"""SHA-256 of the rows' tokens and labels at each scale: everyone who runs this runs the same."""
RECIPE = ROOT / "recipes/gemma3_270m/translation.yaml"
CACHE = Path(os.environ.get("GROW_CACHE", "~/.cache/grow")).expanduser()

KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
"""What grow.model.memory asks of glibc, from outside."""
PARTS = {"all": (0, 1), "first": (0, 1 / 3), "last": (2 / 3, 1)}
"""The layers that grow, from and to, as shares of the depth."""
RIVALS = {
    "trainer": "transformers.Trainer, SFT",
    "trainer_kept": "the same, with memory kept as ours keeps it (grow/model/memory.py)",
    "trl_sft": "TRL SFTTrainer, its defaults",
    "trl_sft_fast": "TRL SFTTrainer, no activation checkpoints",
    "trl_lora": "TRL LoRA r16, all linear layers",
    "trl_lora_fast": "TRL LoRA, no activation checkpoints",
}
OURS = {
    "lora": ("lora", "all", "LoRA r16 with our packing and logits"),
    "sft": ("sft", "all", "our SFT"),
    "g_freeze": ("g_freeze", "all", "G-Freeze, all layers"),
    "g_freeze_first": ("g_freeze", "first", "G-Freeze, first third"),
    "g_freeze_last": ("g_freeze", "last", "G-Freeze, last third"),
}
"""Method, layers, and what it is called."""


def bench(
    folder: str,
    size: str = "270M",
    only: str = ",".join([*RIVALS, *OURS]),
    repeat: int = 1,
    steps: int = 2 * WARMUP,
    stage: int = 1,
    scale: int = 1,
) -> None:
    """Prints the table."""
    work = Path(folder).resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = prepare(work, size, scale)
    print(f"{device()}, {compute_dtype()}, {size}, {steps} steps, the first {WARMUP} not timed, ZeRO-{stage}")
    print(f"{PER_STEP * scale} rows a step\n")
    taken: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeat):
        for name in words(only):
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            result = (
                rival(name, base, work, out, steps, scale)
                if name in RIVALS
                else ours(name, base, work, out, stage, steps, scale)
            )
            taken.setdefault(name, []).append(result)
            print(name, json.dumps(result), file=sys.stderr, flush=True)
    print_table(taken)


def device() -> str:
    """What it runs on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def prepare(work: Path, size: str, scale: int = 1) -> Path:
    """The base, its grown kin, the rows as files; checks the rows."""
    from grow.cli.main import main

    base = CACHE / "gemma3_270m/model"
    if size != "270M":
        from tests.benchmarks.shapes import make_base

        tokenizer, base = base, work / size
        if not base.exists():
            make_base(base, size)
            for file in tokenizer.glob("*token*"):
                shutil.copy(file, base)
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    for name, (begin, end) in PARTS.items():
        grown = work / f"{base.name}-{name}"
        if not grown.exists():
            main(["expand", str(base), str(grown), "--layers", f"{round(begin * layers)}-{round(end * layers) - 1}"])
    recipe = read_recipe(str(RECIPE))
    rows = rows_of(recipe, "train").select(range(ROWS * scale))
    found = checksum(rows, recipe)
    if found != CHECKSUMS.get(scale):
        raise SystemExit(f"other rows than those that the figures are of ({found})")
    data = work / "data"
    data.mkdir(exist_ok=True)
    for split, part in {"train": rows, "validation": rows.select(range(4)), "test": rows.select(range(4))}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return base


def checksum(rows: Any, recipe: Recipe) -> str:
    """SHA-256 of tokens and labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CACHE / "gemma3_270m/model")
    digest = hashlib.sha256()
    for example in encode(rows, tokenizer, template_of(recipe), LENGTH).examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def run(*command: str | Path, **variables: str) -> None:
    """Runs a command, on as many threads as there are cores; its last words if it fails."""
    environment = os.environ | variables
    environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def rival(name: str, base: Path, work: Path, out: Path, steps: int, scale: int) -> dict[str, Any]:
    """Seconds, tokens and labels of the timed steps of one of tests/benchmarks/rivals.py."""
    out.mkdir()
    command = (sys.executable, "-m", "tests.benchmarks.rivals", name, base, work / "data", out, str(steps), str(scale))
    run(*command, **(KEPT if "kept" in name else {}))
    return json.loads((out / "result.json").read_text())


def ours_recipe(name: str, base: Path, work: Path, out: Path, stage: int, steps: int, scale: int = 1) -> Path:
    """The recipe of one of OURS."""
    method, part, _ = OURS[name]
    values = yaml.safe_load(RECIPE.read_text()) | {
        "base": str(base), "grown": str(work / f"{base.name}-{part}"), "method": method, "data": str(work / "data"),
        "attention": "", "switch": "", "retention": None, "max_length": LENGTH, "train_batch_size": scale,
        "per_device_train_batch_size": scale, "max_steps": steps,
        "logging_steps": 1, "eval_steps": 1000, "save_steps": 1000, "output_dir": str(out),
        "deepspeed": str(ROOT / f"grow/training/deepspeed/zero{stage}.json"),
    }  # fmt: skip
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def ours(name: str, base: Path, work: Path, out: Path, stage: int, steps: int, scale: int) -> dict[str, Any]:
    """Likewise, of a run of ours, from what it logged of each step."""
    run(sys.executable, "-m", "grow", "train", ours_recipe(name, base, work, out, stage, steps, scale))
    history = json.loads((last_checkpoint(out) / "trainer_state.json").read_text())["log_history"]
    timed = [entry for entry in history if "seconds_per_step" in entry][WARMUP:]
    seconds = sum(step["seconds_per_step"] for step in timed)
    tokens, labels = (
        sum(step[f"{what}_per_second"] * step["seconds_per_step"] for step in timed) for what in ("tokens", "labels")
    )
    result = {"seconds": seconds, "tokens": tokens, "labels": labels, "steps": len(timed)}
    if "mfu" in timed[0]:
        result["mfu"] = sum(step["mfu"] * step["seconds_per_step"] for step in timed) / seconds
    return result


def print_table(taken: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over the repeats, and their ratio to those of the two that others are judged by."""
    pace = {name: statistics.median(r["tokens"] / r["seconds"] for r in results) for name, results in taken.items()}
    print("| | text tokens/s (min to max) | labels/s | s a step | ÷ Trainer | ÷ LoRA ours | MFU |")
    print("|---|---|---|---|---|---|---|")
    for name, results in taken.items():
        each = sorted(r["tokens"] / r["seconds"] for r in results)
        labels = statistics.median(r["labels"] / r["seconds"] for r in results)
        step = statistics.median(r["seconds"] / r["steps"] for r in results)
        against = [f"{pace[name] / pace[other]:.2f}" if other in pace else "" for other in ("trainer", "lora")]
        what = RIVALS[name] if name in RIVALS else OURS[name][2]
        spread = f"{pace[name]:.0f} ({each[0]:.0f} to {each[-1]:.0f})"
        mfu = f"{statistics.median(r['mfu'] for r in results):.1%}" if "mfu" in results[0] else ""
        print(f"| {what} | {spread} | {labels:.0f} | {step:.3f} | {against[0]} | {against[1]} | {mfu} |")


if __name__ == "__main__":
    fire.Fire(bench)
