"""What a step costs the host: processor time a step where the arithmetic is next to nothing. Tests nothing.

    python -m tests.benchmarks.host [--json] [--only sft,g_freeze] [--steps 60] [--layers 18] [--repeat 3] [--profile]

A GPU waits for its host where a step's kernels are short. So the model has as many layers as Gemma 3 270M and next to
no width, and what is measured is a process's time on one core: `bare` is a loop of torch alone, forward, backward,
clipping, AdamW, over the model that the run beside it trains; `trainer` is transformers.Trainer. All see the same rows
in the same sequences, one a step, in bf16 with fp32 master weights. The ratios are to `trainer` and to the run's own
`bare`. With --profile, the functions that took longest come after the table.
"""

import cProfile
import itertools
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch
import yaml

from tests.helpers.tiny import ROOT, TEXT_CONFIG, make_data, make_tokenizer

WARMUP = 20
WIDTHS = TEXT_CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
LENGTH = 64
OURS = {
    "sft": {"method": "sft"},
    "g_freeze": {"method": "g_freeze"},
    "sft_compiled": {"method": "sft", "compile": "true"},
    "g_freeze_compiled": {"method": "g_freeze", "compile": "true"},
}
"""Runs of ours, and what their recipes say."""


class Clock:
    """Takes the process's time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.profile: cProfile.Profile | None = None

    def tick(self) -> None:
        self.times.append(time.process_time())
        if self.profile is not None and len(self.times) == WARMUP:
            self.profile.enable()

    def milliseconds(self) -> float:
        """The median step's, of those that are timed."""
        if self.profile is not None:
            self.profile.disable()
        timed = self.times[WARMUP - 1 :]
        return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(timed))


def callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    return Ticks()


def prepare(work: Path, layers: int) -> None:
    """A base, its grown kin, rows."""
    import transformers

    from grow.checkpoint.expand import expand

    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**WIDTHS | {"num_hidden_layers": layers}))
    model.to(torch.bfloat16).save_pretrained(work / "base")
    make_tokenizer(work / "base")
    expand(str(work / "base"), str(work / "grown"))
    make_data(work / "data")


def recipe(work: Path, name: str, steps: int) -> Path:
    """The recipe of one of OURS."""
    out = work / name
    fields = {
        "base": str(work / "base"), "grown": str(work / "grown"), "data": str(work / "data"),
        "prompt": "{question}", "completion": "{answer}", "deepspeed": "zero1", "output_dir": str(out),
        "learning_rate": 1e-4, "max_length": LENGTH, "train_batch_size": 1, "per_device_train_batch_size": 1,
        "max_steps": steps, "save_steps": 10**6, "eval_steps": 10**6, "logging_steps": 10, "report_to": "none",
        "dtype": "bfloat16",
    }  # fmt: skip
    out.mkdir()
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(fields | OURS[name]))
    return file


def ours(work: Path, name: str, steps: int, clock: Clock) -> None:
    """A run as a user has it: `grow train` with a recipe."""
    from grow.cli.main import main
    from grow.training.trainer import GrowTrainer

    begin = GrowTrainer.__init__

    def watched(self: Any, **kwargs: Any) -> None:
        begin(self, **kwargs)
        self.add_callback(callback(clock))

    GrowTrainer.__init__ = watched  # type: ignore[method-assign]
    code = main(["train", str(recipe(work, name, steps))])
    if code:
        raise SystemExit(code)


def batches(work: Path, name: str) -> Any:
    """The packed sequences of a run of ours, over and over."""
    from grow.data.packing import collate
    from grow.data.tokenizer import load_tokenizer
    from grow.methods import read_recipe
    from grow.training.run_data import read_data
    from grow.training.start import starting_checkpoint

    settings = read_recipe(str(recipe(work, name, 1)))
    start = starting_checkpoint(settings)
    return settings, read_data(settings, start, load_tokenizer(str(work / "base")))["train"], collate


def trainer(work: Path, steps: int, clock: Clock) -> None:
    """transformers.Trainer on the same sequences, everything trained."""
    import transformers

    _, sequences, collate = batches(work, "sft")
    args = transformers.TrainingArguments(
        output_dir=str(work / "trainer"), per_device_train_batch_size=1, max_steps=steps, save_strategy="no",
        report_to="none", bf16=True, use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_steps=10,
        remove_unused_columns=False, max_grad_norm=1.0,
    )  # fmt: skip

    def collated(samples: Any) -> Any:
        batch = collate(samples)
        return {name: batch[name] for name in ("input_ids", "position_ids", "labels")}

    model = transformers.AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    running = transformers.Trainer(
        model=model, args=args, train_dataset=sequences, data_collator=collated, callbacks=[callback(clock)]
    )
    running.train()


def bare(work: Path, name: str, steps: int, clock: Clock) -> None:
    """Torch alone over what a run of ours trains: the model in bf16, its master weights, gradients and Adam's moments
    in one flat fp32 tensor each, as the best of loops would have them."""
    from grow.model.loading import compute_device, load
    from grow.model.loss import labelled_logits, loss_sum

    settings, sequences, collate = batches(work, name)
    model: Any = load(settings.start, torch.bfloat16).to(compute_device()).train()
    settings.make_method().prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.cat([parameter.data.flatten() for parameter in trained])
    gradient, master = torch.zeros_like(flat), torch.nn.Parameter(flat.float())
    place = 0
    for parameter in trained:
        end = place + parameter.numel()
        parameter.data = flat[place:end].view_as(parameter)
        parameter.grad = gradient[place:end].view_as(parameter)
        place = end
    optimizer = torch.optim.AdamW([master], lr=1e-4, fused=True)
    for step in range(steps):
        batch = {key: value.to(flat.device) for key, value in collate([sequences[step % len(sequences)]]).items()}
        logits, labels = labelled_logits(model, batch)
        (loss_sum(logits, labels) / len(labels)).backward()
        master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_([master], 1.0)
        optimizer.step()
        flat.copy_(master.data)
        gradient.zero_()
        clock.tick()


def measure(name: str, layers: int, steps: int, profile: bool) -> None:
    """Prints one run's milliseconds of processor time a step; a process of its own."""
    clock = Clock()
    if profile:
        clock.profile = cProfile.Profile()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, layers)
        if name == "trainer":
            trainer(work, WARMUP + steps, clock)
        elif name.startswith("bare_"):
            bare(work, name.removeprefix("bare_"), WARMUP + steps, clock)
        else:
            ours(work, name, WARMUP + steps, clock)
        found = clock.milliseconds()
        if clock.profile is not None:
            pstats.Stats(clock.profile).sort_stats("cumulative").print_stats(70)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    print(f"\n{found}")


def bench(
    json: bool = False,
    only: str = ",".join(OURS),
    steps: int = 60,
    layers: int = 18,
    repeat: int = 3,
    profile: bool = False,
) -> None:
    """Prints the table, or one object with --json: medians of processes that are run in turn."""
    chosen = only.split(",") if isinstance(only, str) else only  # fire makes a tuple of a list with commas
    names = [name for name in OURS if name in chosen]
    wanted = ["trainer", *(f"bare_{name}" for name in names if "compiled" not in name), *names]
    taken: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(repeat):
        for name in wanted:
            command = [sys.executable, "-m", "tests.benchmarks.host", "measure", name, str(layers), str(steps)]
            done = subprocess.run(
                [*command, str(profile)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                capture_output=True,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            taken[name].append(float(done.stdout.split()[-1]))
            if profile:
                print(name, done.stdout, sep="\n")
    print_results({name: statistics.median(times) for name, times in taken.items()}, as_json=json)


def print_results(median: dict[str, float], as_json: bool) -> None:
    """The table, or one JSON object: milliseconds, and ratios to Trainer and to a run's own bare loop."""
    found: dict[str, Any] = {"milliseconds": {name: round(value, 2) for name, value in median.items()}}
    for name, value in median.items():
        found[name] = round(value / median["trainer"], 3)
    bares = {name: median.get(f"bare_{name.removesuffix('_compiled')}") for name in median}
    found["to_bare"] = {name: round(median[name] / bare, 3) for name, bare in bares.items() if bare}
    if as_json:
        print(json.dumps(found))
        return
    print("| | processor time a step, ms | ÷ Trainer | ÷ bare loop |\n|---|---|---|---|")
    for name, value in median.items():
        of_bare = f"{found['to_bare'][name]:.2f}" if name in found["to_bare"] else ""
        print(f"| {name} | {value:.1f} | {found[name]:.2f} | {of_bare} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True")
    else:
        fire.Fire(bench)
