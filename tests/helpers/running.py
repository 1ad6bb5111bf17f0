"""Training runs in tests: quickly, and twice, to see that one that resumes ends in the same bits."""

import copy
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from grow.checkpoint.consolidate import consolidate as offline
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.run_folder import validation_losses
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.trained_weights import Export
from grow.checkpoint.zero import ZeroCheckpoint
from grow.cli.main import main
from grow.data.examples import Example
from grow.data.load import load_rows
from grow.data.template import Template
from grow.data.tokens import encode
from grow.methods import METHODS, Method, export_trained
from grow.model.loss import token_scores
from tests.helpers.tiny import file_checksum, folder_checksums, free_ports, run, step_lines

# Processes that are forked from one with the imports done: a run takes two seconds instead of ten. A GPU's driver does
# not survive a fork.
FORKED: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
FORKED.set_forkserver_preload(["deepspeed", "transformers.trainer", "datasets", "peft"])


def train(recipe: Path, ranks: int) -> str:
    """Trains; returns what was printed."""
    if ranks > 1:
        return run("launch/train.sh", recipe, NPROC=str(ranks)).stdout
    output = recipe.with_suffix(".out")
    process = FORKED.Process(target=train_here, args=(recipe, output))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()[-3000:]
    return output.read_text()


def train_here(recipe: Path, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        METHODS.update(toy=Toy, deeper=Deeper)
        sys.exit(main(["train", str(recipe)]))


def here(capsys: Any, *arguments: str | Path, code: int = 0) -> str:
    """Runs grow in this process. Returns what it printed, or of a mistake its line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    said = capsys.readouterr()
    if code == 0:
        return said.out
    (line,) = said.err.splitlines()
    assert said.out == "" and line.startswith("grow: ")
    return line


def start(recipe: Path, ranks: int, rank: Callable[..., None] | None = None) -> str:
    """Trains on so many ranks, forked, without a launcher. Returns what the first said."""
    (port,) = free_ports(1)
    outputs = [recipe.with_suffix(f".{rank}.out") for rank in range(ranks)]
    processes = [
        FORKED.Process(target=rank or rank_here, args=(recipe, output, number, ranks, str(port)))
        for number, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process, output in zip(processes, outputs, strict=True):
        process.join()
        assert process.exitcode == 0, output.read_text()[-3000:]
    return outputs[0].read_text()


def rank_here(recipe: Path, output: Path, rank: int, ranks: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train_here(recipe, output)


def curve(checkpoint: Path) -> list[dict[str, float]]:
    """What was logged of every step until a checkpoint."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def consolidate(*arguments: Any, **options: Any) -> dict[str, Any]:
    """As the command does it, for runs by any method."""
    return offline(*arguments, **options, export=export_trained)


@dataclass
class Toy(Method):
    """All that a new method takes: this, and its line in the table."""

    toy_layer: int = 0

    def trains(self, name: str) -> bool:
        return f".layers.{self.toy_layer}.self_attn.q_proj." in name

    def begin(self, trainer: Any) -> None:
        torch.save(trainer.start_losses(), Path(trainer.args.output_dir) / "losses.pt")

    def write_result(self, run: Path, out: Path) -> None:
        out.mkdir()
        (out / "toy.txt").write_text("done")


@dataclass
class Deeper(Method):
    """Adds a copy of the last layer above it, which at first adds nothing to its input, and trains that."""

    def add_parameters(self, model: Any) -> None:
        layer = copy.deepcopy(model.model.layers[-1])
        layer.self_attn.layer_idx += 1
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(module.weight)
        model.model.layers.append(layer)
        model.config.num_hidden_layers += 1
        model.config.layer_types = [*model.config.layer_types, model.config.layer_types[-1]]

    def trains(self, name: str) -> bool:
        return ".layers.4." in name

    def export(self, start: Checkpoint, trained: dict[str, LazyTensor], dtype: str) -> Export:
        types = start.config["layer_types"]
        return Export(trained, start.config | {"num_hidden_layers": 5, "layer_types": [*types, types[-1]]})


def train_and_resume(recipe: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Trains, trains again from the middle, and compares; returns what trained, fp32."""
    folder = Path(yaml.safe_load(recipe.read_text())["output_dir"])
    train(recipe, ranks)
    losses = [loss for _, loss in validation_losses(folder / "checkpoint-4")]
    assert losses[-1] < losses[0] - 0.1, "it learns"
    first = {name: value.load() for name, value in ZeroCheckpoint(folder / "checkpoint-4").trained.items()}
    result = folder_checksums(folder / "result") if (folder / "result").exists() else {}
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "COMPLETE").unlink()
    assert len(step_lines(train(recipe, ranks))) == 2, "steps 3 and 4 are done again, and no others"
    again = {name: value.load() for name, value in ZeroCheckpoint(folder / "checkpoint-4").trained.items()}
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert {n: c for n, c in result.items() if n.endswith("tensors")} == (
        {n: file_checksum(folder / "result" / n) for n in result if n.endswith("tensors")}
    )
    return first


def rows_of(base: Path, data: Path, split: str) -> Sequence[Example]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return encode(load_rows(str(data), split), tokenizer, Template("{question}", "{answer}")).examples


def alone(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """A row's loss at each of its labels, unpacked."""
    length = len(example.labels)
    batch = {"input_ids": example.input_ids, "labels": example.labels, "rows": [0] * length}
    tensors = {name: torch.tensor(values)[None] for name, values in batch.items()}
    return -token_scores(model, tensors | {"position_ids": torch.arange(length)[None]})[0]
