"""What the patches of DeepSpeed gain (grow/training/deepspeed_patches), as ratios within one run. Tests nothing.

    GOMP_SPINCOUNT=0 python -m tests.benchmarks.patches FOLDER [--method sft] [--stage 1] [--steps 60] [--saves 6]

On the real 270M in one process, with the rows of tests/benchmarks/training.py, whose FOLDER it is. Each step takes both
norms, one after the other; the optimizer steps by turns; and the last checkpoint is written by turns. GOMP_SPINCOUNT
keeps OpenMP's threads from spinning where other processes want the cores.
"""

import json
import shutil
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import fire

from tests.benchmarks.training import WARMUP, ours_recipe, prepare

Times = tuple[float, float]
"""Seconds on the clock, and of all cores."""


def now() -> Times:
    return time.perf_counter(), time.process_time()


def since(begun: Times) -> Times:
    wall, cpu = now()
    return wall - begun[0], cpu - begun[1]


class ByTurns:
    """What is timed; `taken` has each measurement's (with, without)."""

    def __init__(self) -> None:
        self.steps: dict[bool, list[Times]] = defaultdict(list)
        self.taken: dict[str, list[tuple[Times, Times]]] = defaultdict(list)
        self.norms = ((0.0, 0.0), (0.0, 0.0))

    def watch(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        optimizer, bench = trainer.model_wrapped.optimizer, self
        ours, own_step = optimizer.get_grad_norm_direct, vars(optimizer).get("step")

        def both(gradients: Any, params: Any, norm_type: float = 2) -> Any:
            begun = now()
            type(optimizer).get_grad_norm_direct(optimizer, gradients, params, norm_type)
            theirs, begun = since(begun), now()
            norm = ours(gradients, params, norm_type)
            bench.norms = tuple(  # type: ignore[assignment]
                (old[0] + new[0], old[1] + new[1]) for old, new in zip(bench.norms, (since(begun), theirs), strict=True)
            )
            return norm

        class Turns(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                step = state.global_step
                self.patched = own_step is not None and (step + step // WARMUP) % 2 == 0
                vars(optimizer).pop("step", None)
                if self.patched:
                    optimizer.step = own_step
                bench.norms, self.begun = ((0.0, 0.0), (0.0, 0.0)), now()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                whole, (with_it, without) = since(self.begun), bench.norms
                if state.global_step > WARMUP:
                    step = (whole[0] - without[0], whole[1] - without[1])
                    bench.steps[self.patched].append(step)
                    other = (whole[0] - with_it[0], whole[1] - with_it[1])
                    bench.taken["gradient_norm"].append((step, other))

        optimizer.get_grad_norm_direct = both
        trainer.add_callback(Turns())

    def save(self, trainer: Any, folder: Path, count: int) -> None:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        from grow.checkpoint.run_folder import fsync_and_hash

        engine = trainer.model_wrapped
        for turn in range(count + 1):
            seconds = []
            for writer in (engine.checkpoint_engine, TorchCheckpointEngine(engine._config)):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                kept, engine.checkpoint_engine, begun = engine.checkpoint_engine, writer, now()
                trainer._save_optimizer_and_scheduler(str(folder))
                fsync_and_hash(folder, 0, getattr(writer, "written", {}))
                seconds.append(since(begun))
                engine.checkpoint_engine = kept
            if turn:
                self.taken["checkpoint_engine"].append((seconds[0], seconds[1]))
        shutil.rmtree(folder)


def bench(folder: str, method: str = "sft", stage: int = 1, steps: int = 60, saves: int = 6) -> None:
    """Prints the table: medians, and the medians' ratio."""
    work = Path(folder).resolve()
    work.mkdir(parents=True, exist_ok=True)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = ours_recipe(method, prepare(work, "270M"), work, out, stage, WARMUP + steps)

    from grow.cli.main import main
    from grow.training.trainer import GrowTrainer

    turns = ByTurns()
    prepare_training, save = GrowTrainer._prepare_for_training, GrowTrainer._save_checkpoint

    def prepared(trainer: Any, *arguments: Any) -> Any:
        result = prepare_training(trainer, *arguments)
        turns.watch(trainer)
        return result

    def saved(trainer: Any, *arguments: Any) -> None:
        turns.save(trainer, work / "by-turns", saves)
        save(trainer, *arguments)

    GrowTrainer._prepare_for_training, GrowTrainer._save_checkpoint = prepared, saved
    main(["train", str(recipe)])
    if turns.steps[True]:
        turns.taken["adam_step"] = list(zip(turns.steps[True], turns.steps[False], strict=False))
    print(f"\n{method}, ZeRO-{stage}\n\n| | with | without | ratio | of processor time |\n|---|---|---|---|---|")
    for name, pairs in turns.taken.items():
        (wall, cpu), (wall_without, cpu_without) = (
            [statistics.median(pair[side][clock] for pair in pairs) for clock in (0, 1)] for side in (0, 1)
        )
        print(f"| {name} | {wall:.3f} s | {wall_without:.3f} s | {wall_without / wall:.2f} | {cpu_without / cpu:.2f} |")
    print(json.dumps(turns.taken))


if __name__ == "__main__":
    fire.Fire(bench)
