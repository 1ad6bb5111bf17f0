"""Everything that a GPU is needed for, in one command: speed, memory, kernels, bit-identity. Prints a table.

    python -m tests.benchmarks.gpu [--minutes 8] [--out gpu.jsonl] [--sizes 1B,270M,4B] [--only g_freeze,trainer]
                                   [--sequences 8]

Nothing is downloaded: models of the shapes of Gemma 3 270M, 1B and 4B are made on the device with random weights, rows
by a seed. It needs torch and transformers; rivals and runs of `grow train` need the wheels that gpu-wheels.txt names,
and are left out by name where these are not there. The most valuable row comes first; each is written to --out when it
is done, and one that is there from this device is not run again: so it may be stopped, or run out of time, anywhere.
Everyone trains on the same packed sequences with the same attention. On a CPU it runs with tiny shapes.

MFU counts the arithmetic of the method (grow.training.flops), and attention within rows, as a share of the device's
bf16 peak.
"""

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from grow.data.labels import IGNORED
from grow.model.attention import chosen_attention
from grow.model.grown import add_parts, grown_mlps
from grow.model.head import head_loss_sum, known_head
from grow.model.loss import labelled_logits
from grow.names import is_growth, own_name
from grow.plan import GrowthPlan, parse_layers
from grow.training.compiling import compile_layers, missing_compiler
from grow.training.flops import StepFlops, peak

ROOT = Path(__file__).parents[2]
LENGTH, STEPS, WARMUP = 1024, 12, 4
VOCABULARY = 262_144
SHAPES: dict[str, dict[str, int]] = {
    "270M": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
             "num_key_value_heads": 1, "head_dim": 256},
    "1B": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
           "num_key_value_heads": 1, "head_dim": 256},
    "4B": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 256},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
OURS = {
    "g_freeze": ("g_freeze", "all"), "g_freeze_third": ("g_freeze", "upper third"), "g_train": ("g_train", "all"),
    "sft": ("sft", ""), "lora": ("lora", ""), "g_freeze_eager": ("g_freeze", "all"),
    "g_freeze_liger": ("g_freeze", "all"),
}  # fmt: skip
"""Steps of ours in a loop of torch alone: method, and layers that grow."""
NEEDS = {
    "trainer": "accelerate", "trl": "trl", "lora": "peft", "run": "deepspeed", "g_freeze_liger": "liger_kernel",
}  # fmt: skip
"""What a row imports that may not be there."""
ROWS = (
    "g_freeze", "trainer", "sft", "lora", "g_freeze_third", "g_train", "trl", "g_freeze_eager", "g_freeze_liger",
    "identity", "branches", "run",
)  # fmt: skip
WHAT = {
    "g_freeze": "G-Freeze, all layers", "g_freeze_third": "G-Freeze, upper third", "g_train": "G-Train, all layers",
    "sft": "SFT", "lora": "LoRA r16", "trainer": "transformers.Trainer, SFT", "trl": "TRL, SFT (Liger if it is there)",
    "g_freeze_eager": "G-Freeze, all layers, not compiled",
    "g_freeze_liger": "G-Freeze, all layers, Liger instead of compiling",
}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config(size: str) -> transformers.Gemma3TextConfig:
    vocabulary = 320 if size == "tiny" else VOCABULARY
    return transformers.Gemma3TextConfig(
        **SHAPES[size], vocab_size=vocabulary, bos_token_id=2, eos_token_id=1, pad_token_id=0
    )


def base_model(size: str, dtype: torch.dtype = torch.bfloat16, computes: torch.dtype | None = None) -> Any:
    """A model of the shape, its weights drawn on the device; `computes` is the type of a rival's autocast."""
    torch.manual_seed(0)
    with device():
        made = transformers.Gemma3ForCausalLM(config(size)).to(dtype)
    made.set_attn_implementation(chosen_attention("auto", made, computes))
    return made


def grow_in_memory(model: Any, layers: str) -> None:
    """Gives layers of a model their copies, as `expand` would have written them."""
    count = model.config.num_hidden_layers
    chosen = tuple(range(count - count // 3, count)) if layers == "upper third" else parse_layers(layers, count)
    with device():
        add_parts(model, GrowthPlan(2, chosen))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if is_growth(name):
                parameter.data = own[own_name(name)] * (0.5 if "down_proj" in name else 1)


def prepared(size: str, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model as a method trains it."""
    method, layers = OURS[name]
    model = base_model(size, dtype)
    if layers:
        grow_in_memory(model, layers)
    if method == "g_train":
        for mlp in grown_mlps(model):
            mlp.add_trained(device=device(), dtype=dtype)
            for own, copy in zip((mlp.gate_proj, mlp.up_proj), mlp.trained.parameters(), strict=True):
                copy.data.copy_(own.weight)
    if method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        model = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), model)
    if name == "g_freeze_liger":
        with_liger(model)
    trains = {"sft": lambda _: True, "lora": lambda name: ".lora_" in name}.get(method, is_growth)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(parameter_name))
    return model.train()


def with_liger(model: Any) -> None:
    """Lets a model use Liger's kernels."""
    from grow.training.liger import use_liger

    use_liger(model)


def packed(size: str, sequences: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of packed sequences, full of rows of 32 to 512 tokens, the second half of each to be learnt."""
    generator = torch.Generator().manual_seed(0)
    length = 64 if size == "tiny" else LENGTH
    shortest, longest = length // 32, length // 2
    found = []
    for _ in range(count):
        positions, learnt = [], []
        for _ in range(sequences):
            own_positions, own_learnt = [], []
            while len(own_positions) < length:
                row = int(torch.randint(shortest, longest, (), generator=generator))
                row = min(row, length - len(own_positions))
                own_positions += range(row)
                own_learnt += [place >= row // 2 for place in range(row)]
            positions.append(own_positions)
            learnt.append(own_learnt)
        ids = torch.randint(3, config(size).vocab_size, (sequences, length), generator=generator)
        labels = torch.where(torch.tensor(learnt), ids.roll(-1, 1), IGNORED)
        batch = {"input_ids": ids, "position_ids": torch.tensor(positions), "labels": labels}
        found.append({name: tensor.to(device()) for name, tensor in batch.items()})
    return found


def attention_flops(batch: dict[str, Tensor], size: str, passes: int) -> float:
    """Queries times keys and weights times values, causal within rows; windows are longer than these rows."""
    positions = batch["position_ids"].flatten().double()
    pairs = float((positions + 1).sum())
    shape = SHAPES[size]
    return passes * 4 * pairs * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]


class Clock:
    """Takes the time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        timed = self.times[WARMUP - 1 :]
        return statistics.median(after - before for before, after in itertools.pairwise(timed))


def loop(model: Any, batches: list[dict[str, Tensor]], compiled: bool, clock: Clock) -> Any:
    """Trains as a run of ours does, without DeepSpeed: fp32 master weights, gradients clipped. Returns a step."""
    head = known_head(model)
    if compiled:
        compile_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [nn.Parameter(parameter.detach().float()) for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=True)

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        count = (batch["labels"] != IGNORED).sum()
        (head_loss_sum(model, head, batch) / count).backward()
        for master, parameter in zip(masters, trained, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(trained, masters)
        clock.tick()

    for number in range(WARMUP + STEPS):
        step(number)
    return step


def kernels(step: Any) -> dict[str, Any]:
    """The share of three steps' time that the device spends in kernels, and the ten that take longest a step."""
    on_gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        step(0)  # the profiler's own start is in the first
        synchronize()
        begun = time.perf_counter()
        for number in range(3):
            step(number)
        passed = (time.perf_counter() - begun) / 3
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        # Of an operation on the host, torch gives the time of its kernels too; these are events of their own.
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spent[event.key] = event.self_device_time_total / 4e6
        elif not on_gpu:
            spent[event.key] = event.self_cpu_time_total / 4e6
    top = sorted(spent.items(), key=lambda item: -item[1])[:10]
    return {
        "in_kernels": round(sum(spent.values()) / passed, 3),
        "kernels": [[name[:80], round(seconds * 1e3, 3)] for name, seconds in top],
    }


def measure_ours(size: str, name: str, sequences: int) -> dict[str, Any]:
    model, clock = prepared(size, name), Clock()
    flops = StepFlops(model)
    batches = packed(size, sequences, 4)
    compiled = torch.cuda.is_available() and name not in ("g_freeze_eager", "g_freeze_liger") and not missing_compiler()
    step = loop(model, batches, compiled, clock)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return figures(size, batches, clock.seconds(), flops) | kernels(step) | {
        "trained": trained, "attention": model.config._attn_implementation, "compiled": compiled,
    }  # fmt: skip


def figures(size: str, batches: list[dict[str, Tensor]], seconds: float, flops: StepFlops) -> dict[str, Any]:
    tokens = batches[0]["input_ids"].numel()
    labels = statistics.mean(float((batch["labels"] != IGNORED).sum()) for batch in batches)
    asked = flops.of(tokens, labels) + attention_flops(batches[0], size, 3)
    most = peak()
    return {
        "seconds": seconds, "tokens_per_second": tokens / seconds, "mfu": asked / seconds / most if most else None,
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }  # fmt: skip


def rival(size: str, name: str, sequences: int) -> dict[str, Any]:
    """Trainer, or TRL's SFTTrainer, on the same batches."""
    batches, clock = packed(size, sequences, 4), Clock()

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    rows: Any = [
        {key: value[place].tolist() for key, value in batches[number % len(batches)].items()}
        for number in range(WARMUP + STEPS)
        for place in range(sequences)
    ]

    def collated(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        made = {key: torch.tensor([sample[key] for sample in samples]) for key in samples[0]}
        labels = torch.full_like(made["labels"], IGNORED)  # transformers' are those of the same place
        labels[:, 1:] = made["labels"][:, :-1]
        found = {"input_ids": made["input_ids"], "position_ids": made["position_ids"], "labels": labels}
        if "flash" not in model.config._attn_implementation:
            return found
        return {key: value.reshape(1, -1) for key, value in found.items()}  # or it leaks between rows

    model = base_model(size, torch.float32, computes=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        args: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": sequences, "max_steps": WARMUP + STEPS,
            "save_strategy": "no", "report_to": "none", "bf16": True, "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True, "learning_rate": 1e-6, "logging_steps": 10**6,
        }  # fmt: skip
        if name == "trl":
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            from tests.helpers.tiny import make_tokenizer

            make_tokenizer(Path(folder))
            liger = importlib.util.find_spec("liger_kernel") is not None
            running: Any = SFTTrainer(
                model=model, train_dataset=Dataset.from_list(rows), data_collator=collated, callbacks=[Ticks()],
                args=SFTConfig(
                    **args, use_liger_kernel=liger, gradient_checkpointing=False,
                    dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
                ),
                processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            )  # fmt: skip
        else:
            arguments = transformers.TrainingArguments(**args, remove_unused_columns=False)
            running = transformers.Trainer(
                model=model, args=arguments, train_dataset=rows, data_collator=collated, callbacks=[Ticks()]
            )
        running._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(running.train_dataset)
        running.train()
    return figures(size, batches, clock.seconds(), StepFlops(model)) | {"attention": model.config._attn_implementation}


@torch.no_grad()
def identity(size: str, _: str, sequences: int) -> dict[str, Any]:
    """Whether base and grown model have the same logits at step 0, bit for bit, in fp32 and bf16; how far they are
    apart where both are compiled; and whether they have the same where both use Liger's kernels."""
    found: dict[str, Any] = {}
    liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    for dtype in (torch.bfloat16, torch.float32):
        model, batch = base_model(size, dtype).eval(), packed(size, 1, 1)[0]
        before = labelled_logits(model, batch)[0]
        grow_in_memory(model, "all")
        after = labelled_logits(model, batch)[0]
        name = str(dtype).removeprefix("torch.")
        found[name] = {"identical": torch.equal(before, after)}
        if torch.cuda.is_available() and not missing_compiler():
            compile_layers(model)
            compiled = labelled_logits(model, batch)[0]
            found[name]["compiled_apart"] = float((compiled - before).abs().max())
            found[name]["largest"] = float(before.abs().max())
        del model, before, after
    for dtype in (torch.bfloat16, torch.float32) if liger else ():
        model, batch = base_model(size, dtype).eval(), packed(size, 1, 1)[0]
        with_liger(model)
        before = labelled_logits(model, batch)[0]
        grow_in_memory(model, "all")
        same = torch.equal(before, labelled_logits(model, batch)[0])
        found[str(dtype).removeprefix("torch.")]["identical_with_liger"] = same
    return found


def branches(size: str, _: str, sequences: int) -> dict[str, Any]:
    """The two branches of a grown MLP beside one MLP of twice the width, forward and backward."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

    from grow.model.mlp import grow_mlp

    shape = config(size)
    wide = transformers.Gemma3TextConfig(**SHAPES[size] | {"intermediate_size": 2 * shape.intermediate_size})
    x = torch.randn(sequences * LENGTH, shape.hidden_size, device=device(), dtype=torch.bfloat16, requires_grad=True)
    seconds = {}
    for name, own in (("one", wide), ("two", shape)):
        mlp: Any = Gemma3MLP(own)
        if name == "two":
            grow_mlp(mlp, 2)
            mlp.requires_grad_(False)
            mlp.grown.requires_grad_(True)
        mlp.to(device(), torch.bfloat16)
        clock = Clock()
        for _ in range(WARMUP + STEPS):
            mlp(x).sum().backward()
            mlp.zero_grad()
            clock.tick()
        seconds[name] = clock.seconds()
    return seconds | {"ratio": seconds["two"] / seconds["one"]}


def run(size: str, _: str, sequences: int) -> dict[str, Any]:
    """A run of `grow train` on tiny shapes, killed and resumed: whether it ends in the same bits."""
    command = [sys.executable, "-m", "pytest", "-q", "--full", "-m", "gpu", "tests/training/test_resume.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"same_bits": done.returncode == 0, "said": done.stdout.strip()[-200:]}


def measure(size: str, name: str, sequences: int) -> dict[str, Any]:
    """One row's figures."""
    kinds = {"identity": identity, "branches": branches, "run": run, "trainer": rival, "trl": rival}
    return kinds.get(name, measure_ours)(size, name, sequences)


def bench(
    minutes: float = 8,
    out: str = "gpu.jsonl",
    sizes: str = "1B,270M,4B" if torch.cuda.is_available() else "tiny",
    only: str = ",".join(ROWS),
    sequences: int = 8,
) -> None:
    """Runs the rows that are not in --out yet, as long as there is time, and prints the table."""
    end, file, name = time.monotonic() + 60 * minutes, Path(out), device_name()
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    there = {(line["size"], line["row"]) for line in done if line["device"] == name and "failed" not in line}
    done = [line for line in done if (line["size"], line["row"]) in there or line["device"] != name]
    for row, size in itertools.product(only.split(","), sizes.split(",")):
        needed = NEEDS.get(row)
        if (size, row) in there or (row == "run" and size != sizes.split(",")[0]):
            continue
        if needed and importlib.util.find_spec(needed) is None:
            print(f"{row}: left out, {needed} is not installed (gpu-wheels.txt)", file=sys.stderr)
            continue
        left = end - time.monotonic()
        if left < 20:
            print(f"{row}, {size}: left out, the time is up; the same command goes on", file=sys.stderr)
            continue
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--row", size, row, str(sequences)]
        line: dict[str, Any] = {"device": name, "size": size, "row": row, "sequences": sequences}
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
            last = ran.stdout.strip().splitlines()[-1:]
            line |= json.loads(last[0]) if ran.returncode == 0 else {"failed": reason(ran.stderr)}
        except subprocess.TimeoutExpired:
            print(f"{row}, {size}: left out, the time is up; the same command goes on", file=sys.stderr)
            continue
        done.append(line)
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
    print(table([line for line in done if line["device"] == name]))


def reason(stderr: str) -> str:
    """The last line of what a row said; or that its memory did not suffice."""
    if "out of memory" in stderr.lower():
        return "does not fit"
    return (stderr.strip().splitlines() or ["said nothing"])[-1][:200]


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def table(lines: list[dict[str, Any]]) -> str:
    """The table for a README, with the device's name and versions; then kernels, and what was checked."""
    names = lines[0]["device"] if lines else "nothing"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    shown = [f"{names}, {versions}, {LENGTH} tokens a sequence\n"]
    shown.append("| shape | | tokens/s | s a step | ÷ Trainer | MFU | in kernels | peak memory |")
    shown.append("|---|---|---|---|---|---|---|---|")
    stock = {
        line["size"]: line["tokens_per_second"] for line in lines if line["row"] == "trainer" and "seconds" in line
    }
    for line in lines:
        if line["row"] not in WHAT:
            continue
        what = f"| {line['size']} | {WHAT[line['row']]} "
        if "failed" in line:
            shown.append(f"{what}| {line['failed']} | | | | | |")
            continue
        ratio = f"{line['tokens_per_second'] / stock[line['size']]:.2f}" if line["size"] in stock else ""
        mfu = f"{line['mfu']:.1%}" if line["mfu"] else ""
        memory = f"{line['memory'] / 1e9:.1f} GB" if line["memory"] else ""
        inside = f"{line['in_kernels']:.0%}" if "in_kernels" in line else ""
        pace = f"{line['tokens_per_second']:,.0f} | {line['seconds']:.4f}"
        shown.append(f"{what}| {pace} | {ratio} | {mfu} | {inside} | {memory} |")
    for line in lines:
        if line["row"] not in WHAT:
            said = {key: value for key, value in line.items() if key not in ("device", "row", "size", "sequences")}
            shown.append(f"\n{line['row']}, {line['size']}: {json.dumps(said)}")
        elif line.get("kernels"):
            longest = "; ".join(f"{kernel} {ms:.2f}" for kernel, ms in line["kernels"])
            shown.append(f"\n{line['row']}, {line['size']}, ms a step: {longest}")
    return "\n".join(shown)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        found = measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        print("\n" + json.dumps(found | {"torch": torch.__version__, "transformers": transformers.__version__}))
    else:
        given = dict(zip((flag.removeprefix("--") for flag in sys.argv[1::2]), sys.argv[2::2], strict=True))
        bench(
            **{key: value for key, value in given.items() if key not in ("minutes", "sequences")},
            **{key: kind(given[key]) for key, kind in (("minutes", float), ("sequences", int)) if key in given},
        )
    sys.stdout.flush()
    os._exit(0)  # a compiler's threads may wait for ever
