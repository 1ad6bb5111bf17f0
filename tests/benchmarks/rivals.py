"""The rivals of tests/benchmarks/training.py, each as its documentation has it; run as a process of its own.

python -m tests.benchmarks.rivals NAME BASE DATA OUT STEPS SCALE
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from grow.methods import read_recipe
from grow.model.loading import compute_dtype
from tests.benchmarks.training import PER_STEP, RECIPE, WARMUP


class Clock(TrainerCallback):
    """When each step began."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())


def arguments(out: str, steps: int, batch: int) -> dict[str, Any]:
    return {
        "output_dir": out, "per_device_train_batch_size": batch, "max_steps": steps, "save_strategy": "no",
        "report_to": "none", "bf16": compute_dtype() == torch.bfloat16, "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }  # fmt: skip


def texts(rows: Dataset) -> Dataset:
    """Prompt and completion, as the recipe has them."""
    recipe = read_recipe(str(RECIPE))
    return rows.map(
        lambda row: {"prompt": recipe.prompt.format(**row), "completion": recipe.completion.format(**row)},
        remove_columns=rows.column_names,
    )


def trainer(base: str, rows: Dataset, args: dict[str, Any]) -> transformers.Trainer:
    """The causal language modelling example: pad to the longest, a loss over everything."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = rows.map(
        lambda row: tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token), remove_columns=rows.column_names
    )
    return transformers.Trainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=TrainingArguments(**args),
        train_dataset=encoded,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def trl(base: str, rows: Dataset, args: dict[str, Any], lora: bool, checkpoints: bool) -> SFTTrainer:
    """SFTTrainer on rows of prompt and completion; LoRA on all linear layers."""
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    config = SFTConfig(**args, gradient_checkpointing=checkpoints)
    return SFTTrainer(model=base, args=config, train_dataset=rows, peft_config=peft)


def main(name: str, base: str, data: str, out: str, steps: str, scale: str) -> None:
    batch = PER_STEP * int(scale)
    args = arguments(out, int(steps), batch)
    rows = texts(load_dataset(data, split="train"))
    if name.startswith("trainer"):
        running: Any = trainer(base, rows, args)
    else:
        running = trl(base, rows, args, "lora" in name, "fast" not in name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    clock = Clock()
    running.add_callback(clock)
    # In the order of the file, so that the timed steps are known: what their tokens are is counted here.
    running._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(running.train_dataset)
    running.train()
    timed = rows.select([row % len(rows) for row in range(WARMUP * batch, int(steps) * batch)])
    prompts, completions = (sum(map(len, tokenizer(list(timed[c])).input_ids)) for c in ("prompt", "completion"))
    result = {
        "seconds": clock.times[-1] - clock.times[WARMUP - 1],
        "steps": len(clock.times) - WARMUP,
        # A row's last token is a label only, its first only input, and there is an end token: as many as ours.
        "tokens": prompts + completions,
        "labels": completions + len(timed),
    }
    Path(out, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
