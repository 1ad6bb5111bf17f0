"""Tiny random Gemma 3 models, a tokenizer for them, rows to learn, and a recipe: the smallest of everything real."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16,
    "max_position_embeddings": 256, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256,
}  # fmt: skip
VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip


def make_base(path: Path, kind: str, seed: int = 0) -> Path:
    """A base: "text", one file; or "multimodal", with a vision tower and the hub's names of tensors, in two shards."""
    import transformers

    torch.manual_seed(seed)
    if kind == "text":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT_CONFIG))
    else:
        config = transformers.Gemma3Config(
            text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, mm_tokens_per_image=4,
            image_token_index=259, boi_token_index=260, eoi_token_index=261,
        )  # fmt: skip
        model = transformers.Gemma3ForConditionalGeneration(config)
    # Weights large enough that a row's logits depend on the MLPs beyond rounding, and norms that are not all alike.
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.to(torch.bfloat16).save_pretrained(path)
    if kind == "multimodal":
        to_hub_layout(path)
    make_tokenizer(path)
    if kind == "multimodal":
        _make_processor(path)
    return path


def _make_processor(path: Path) -> None:
    """Gemma 3's processor for images, of 16 by 16, each of which becomes four tokens."""
    from transformers import AutoTokenizer, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = AutoTokenizer.from_pretrained(path, extra_special_tokens=names)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(path)


def to_hub_layout(path: Path) -> None:
    """Renames the tensors as google/gemma-3-4b-pt has them, and shares them out to two shards."""
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name.removeprefix("model."))
        tensors[re.sub(r"^language_model\.(?!model\.)", "language_model.model.", name)] = tensor
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


def make_tokenizer(path: Path) -> None:
    """One token a byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<pad>": 256, "<bos>": 257, "<eos>": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(path)


def make_data(path: Path) -> Path:
    """Rows of sums: {"question": "3+4=", "answer": "7"}."""
    path.mkdir(parents=True)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 20) for b in range(2, 20)]
    for split, part in {"train": rows[::2], "validation": rows[1::8], "test": rows[3::8]}.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return path


def make_recipe(path: Path, base: Path, grown: Path, data: Path, stage: int, **fields: Any) -> Path:
    """A recipe of four steps at a rate that moves the weights."""
    recipe = {
        "base": str(base), "grown": str(grown), "data": str(data), "prompt": "{question}", "completion": "{answer}",
        "deepspeed": f"zero{stage}", "output_dir": str(path.parent / "run"),
        "learning_rate": 1e-2, "weight_decay": 0.01, "max_length": 32, "train_batch_size": 4, "max_steps": 4,
        "per_device_train_batch_size": 1, "save_steps": 2, "eval_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe | fields))
    return path


def run(*command: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository and checks its exit code."""
    variables = os.environ | {"VENV": sys.prefix, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def step_lines(said: str) -> list[str]:
    """The lines of a training log that tell of steps."""
    return re.findall(r"^step +\d+/\d+ +loss .*$", said, re.MULTILINE)


def repository_files() -> list[str]:
    """What would be committed: all but what git ignores."""
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def clone(path: Path) -> Path:
    """The repository as it would be committed, copied."""
    for name in repository_files():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    return path


def environment(checkout: Path) -> Path:
    """A virtual environment of a clone's own, in which it is installed and everything is that is installed here."""
    path = checkout / ".venv"
    venv.create(path, symlinks=True)
    (packages,) = path.glob("lib/python*/site-packages")
    here = [place for place in sys.path if place.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(here))
    shutil.copy(checkout / "requirements.txt", path / "installed-requirements.txt")
    pip = [sys.executable, "-m", "pip", "--python", str(path), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--editable", str(checkout)], check=True)
    return path


def file_checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_checksums(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file_checksum(file) for file in sorted(path.rglob("*")) if file.is_file()}


def grow(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs python -m grow."""
    return run(sys.executable, "-m", "grow", *arguments, code=code)


def tokens(count: int = 40, seed: int = 1) -> torch.Tensor:
    """Random text tokens, [1, count]."""
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def written_scores(model: Any, **inputs: Any) -> torch.Tensor:
    """The logits of eight tokens that are written greedily, with a KV cache."""
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_scores": True}
    given = inputs or {"input_ids": tokens(9)}
    return torch.stack(model.generate(**given, **how, return_dict_in_generate=True).scores)


def logits(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    """Of some text, or of other inputs."""
    with torch.no_grad():
        return model(**({"input_ids": tokens()} | inputs), use_cache=False).logits


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
