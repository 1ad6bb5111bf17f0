"""Run by the deepspeed launcher: trains a small model two steps in every way and saves it, with what it should hold.

    deepspeed … --module tests.helpers.zero_writer BASE OUT

OUT/<case>/{first,second}/… are DeepSpeed's checkpoints, OUT/<case>.safetensors the parameters after the second step.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from tests.helpers.tiny import free_ports, run, tokens

CASES = list(itertools.product((0, 1, 2, 3), ("bf16", "fp32"), (True, False)))


def name_of(stage: int, dtype: str, exclude: bool) -> str:
    return f"zero{stage}-{dtype}-{'trained' if exclude else 'whole'}"


def config(stage: int, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, "sub_group_size": 3000},
        "zero_allow_untested_optimizer": True,
    }


def write(base: str, out: Path, stage: int, dtype: str, exclude: bool) -> None:
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" not in name and "layers.0." not in name)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trained if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in trained if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, dtype))
    case = name_of(stage, dtype, exclude)
    for tag in ("first", "second"):
        ids = tokens(seed=dist.get_rank())
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        engine.save_checkpoint(str(out / case), tag=tag, exclude_frozen_parameters=exclude)
    expected = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)  # None in ZeRO-0, which has no master weights
            expected[name] = (parameter if master is None else master).detach().clone().contiguous()
    if dist.get_rank() == 0:
        save_file(expected, out / f"{case}.safetensors")
    engine.destroy()


def main(base: str, out: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    for case in CASES:
        write(base, Path(out), *case)
    dist.barrier()
    dist.destroy_process_group()


def launch(base: Path, out: Path, ranks: int) -> None:
    """Writes OUT, on so many ranks."""
    launcher, (port,) = Path(sys.prefix) / "bin" / "deepspeed", free_ports(1)
    run(
        launcher, "--no_local_rank", "--num_accelerators", str(ranks), "--master_port", str(port),
        "--module", "tests.helpers.zero_writer", base, out, PATH=f"{launcher.parent}:/usr/bin:/bin",
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
