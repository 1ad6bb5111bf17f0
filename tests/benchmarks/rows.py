"""How long reading rows takes, and how much memory: a run's first start and its second, and TRL's own preparation.

    python -m tests.benchmarks.rows [ROWS] [RANKS]

Rows of two texts of 8 to 60 words, made by seed, with the real 270M's tokenizer and a model so small that it does not
count. Printed are seconds and anonymous memory (RssAnon, what is not shared with the page cache) beyond a start with
300 rows, in the process that has most and in the next; and the seconds of packing alone. Both prepare one sequence
length, with as many processes as there are cores. The rows lie in a temporary folder, and so does the cache.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.tiny import ROOT

LENGTH = 512
TRL = """
import sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
base, data, out, processes, length = sys.argv[1:]
rows = load_dataset("json", data_files=data + "/train.jsonl", split="train")
rows = rows.map(lambda row: {"prompt": f"English: {row['en']}\\nFrench:", "completion": f" {row['fr']}"},
                remove_columns=rows.column_names, num_proc=int(processes))
args = SFTConfig(output_dir=out, packing=True, max_length=int(length), dataset_num_proc=int(processes),
                 report_to="none", use_cpu=True, bf16=False, max_steps=1)
made = SFTTrainer(AutoModelForCausalLM.from_pretrained(base), args, train_dataset=rows,
                  processing_class=AutoTokenizer.from_pretrained(base))
print(len(made.train_dataset), "sequences")
"""


def make_rows(folder: Path, count: int) -> Path:
    """A data folder with so many rows to train on."""
    folder.mkdir()
    chance, words = random.Random(0), re.findall(r"[a-z]{2,}", (ROOT / "README.md").read_text())
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(count):
            texts = (" ".join(chance.choices(words, k=chance.randint(8, 60))) for _ in range(2))
            file.write(json.dumps(dict(zip(("en", "fr"), texts, strict=True))) + "\n")
    for split in ("validation", "test"):
        with (folder / "train.jsonl").open() as rows:
            (folder / f"{split}.jsonl").write_text("".join(next(rows) for _ in range(100)))
    return folder


def make_tiny(folder: Path) -> Path:
    """A model that costs nothing, with the real tokenizer."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    cache = os.environ.get("GROW_CACHE") or os.path.expanduser("~/.cache/grow")
    AutoTokenizer.from_pretrained(f"{cache}/gemma3_270m/model").save_pretrained(folder)
    return folder


def measured(command: list[str], home: Path, **environment: str) -> tuple[float, list[float]]:
    """Seconds, and the most anonymous memory of each of its processes, GB, the largest first."""
    variables = os.environ | {"HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                              "VENV": sys.prefix} | environment  # fmt: skip
    start, most = time.monotonic(), dict[int, float]()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)
        while process.poll() is None:
            for pid in descendants(process.pid):
                most[pid] = max(most.get(pid, 0.0), anonymous(pid))
            time.sleep(0.05)
        seconds = time.monotonic() - start
        log.seek(0)
        assert process.returncode == 0, log.read()[-3000:]
    return seconds, sorted(most.values(), reverse=True)


def facts(pid: int) -> dict[str, str]:
    try:
        return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    except OSError:  # it is over
        return {}


def anonymous(pid: int) -> float:
    return int(facts(pid).get("RssAnon", "0 kB").split()[0]) / 1e6


def descendants(root: int) -> list[int]:
    parents = {int(p.name): int(facts(int(p.name)).get("PPid", "0")) for p in Path("/proc").glob("[0-9]*")}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def packing(count: int) -> float:
    """Seconds to pack so many examples of lengths like these."""
    import numpy as np

    from grow.data.packing import pack

    lengths = np.random.default_rng(0).integers(20, 180, count)
    start = time.monotonic()
    pack(lengths, LENGTH)
    return time.monotonic() - start


def main(count: int = 1_000_000, ranks: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, base = Path(folder), make_tiny(Path(folder) / "base")
        data = {name: make_rows(home / name, rows) for name, rows in (("many", count), ("few", 300))}
        recipe = str(ROOT / "recipes/gemma3_270m/translation.yaml")

        def ours(name: str, run: str) -> tuple[float, list[float]]:
            return measured(
                ["launch/train.sh", recipe, "--base", str(base), "--data", str(data[name]), "--method", "sft",
                 "--max_steps", "1", "--max_length", str(LENGTH), "--output_dir", str(home / run)],
                home / "hf", NPROC=str(ranks),
            )  # fmt: skip

        def trl(name: str, run: str) -> tuple[float, list[float]]:
            words = [str(base), str(data[name]), str(home / run), str(len(os.sched_getaffinity(0)))]
            words.append(str(LENGTH))
            return measured([sys.executable, "-c", TRL, *words], home / f"hf-{run}")

        rows = []
        least = ours("few", "few-run")
        for title, found in (("first start", ours("many", "run1")), ("second start", ours("many", "run2"))):
            rows.append((f"ours, {ranks} ranks, {title}", found, least))
        rows.append(("TRL, packing, first start", trl("many", "trl"), trl("few", "trl-few")))
        print(f"{count:,} rows, {len(os.sched_getaffinity(0))} cores; beyond a start with 300 rows:")
        print("| | seconds | GB, largest process | GB, next |\n|---|---|---|---|")
        for title, (seconds, memory), (base_seconds, base_memory) in rows:
            second = [part[1] if len(part) > 1 else 0.0 for part in (memory, base_memory)]
            first, other = memory[0] - base_memory[0], second[0] - second[1]
            print(f"| {title} | {seconds - base_seconds:.0f} | {first:.2f} | {other:.2f} |")
        print(f"packing {count:,} examples: {packing(count):.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
