"""How fast and in how little memory the converter works, as ratios within one run. Prints a table; tests nothing.

    python -m tests.benchmarks.converter FOLDER [--only expand,consolidate,library,zero] [--sizes 1B,4B] [--repeat 3]

FOLDER is for scratch: 50 GB at the 4B's shape. Times are to durable data (synced); memory is the peak of RssAnon, which
does not count the page cache of mapped files. Each ratio compares medians of runs taken in turn.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import fire
import torch
from safetensors import safe_open

from tests.benchmarks.shapes import make_base, noise, shapes, write_zero3
from tests.helpers.tiny import ROOT
from tests.helpers.tiny import make_base as make_tiny
from tests.helpers.zero_writer import launch

LIBRARY = """
import sys, torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
config.intermediate_size *= 2
grown = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
own, new = base.state_dict(), grown.state_dict()
for name, tensor in own.items():
    if ".mlp.down_proj." in name:
        new[name].copy_(torch.cat([tensor / 2, tensor / 2], dim=1))
    elif ".mlp." in name:
        new[name].copy_(torch.cat([tensor, tensor]))
    else:
        new[name].copy_(tensor)
grown.save_pretrained(sys.argv[2])
"""
BOTH = """
import sys
from grow.cli.main import main
base, grown, stock = sys.argv[1:]
sys.exit(main(["expand", base, grown]) or main(["consolidate", grown, stock]))
"""
DEEPSPEED = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], safe_serialization=True)
"""


def measure(*command: str | Path) -> tuple[float, float]:
    """Runs a command and syncs. Returns seconds and the peak of RssAnon in MB."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        except (OSError, IndexError):
            pass
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"failed: {command}")
    os.sync()
    return time.monotonic() - start, peak / 1024


def grow(*arguments: str | Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "grow", *arguments)


def copy_of(size: int, folder: Path) -> tuple[str | Path, ...]:
    """`cp` of a file of as many bytes (the sync comes with measure)."""
    source = folder / f"{size}.bytes"
    if not source.exists():
        with source.open("wb") as file:
            for _ in range(size // 2**24 + 1):
                file.write(os.urandom(2**16) * 2**8)
            file.truncate(size)
        os.sync()
    return ("cp", source, folder / "copy")


def forget(*folders: Path) -> None:
    """Drops the files' pages from the cache."""
    os.sync()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def duel(
    what: str, mine: tuple, theirs: tuple, outputs: list[Path], repeat: int, cold: list[Path] | None = None
) -> None:
    """Both commands in turn, `repeat` times, and a row of the table."""
    taken: dict[str, list[tuple[float, float]]] = {"mine": [], "theirs": []}
    for _ in range(repeat):
        for who, command in (("mine", mine), ("theirs", theirs)):
            for out in outputs:
                shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            os.sync()
            forget(*(cold or []))
            taken[who].append(measure(*command))
    cells = []
    for who in ("mine", "theirs"):
        seconds, memory = zip(*taken[who], strict=True)
        cells.append(
            f"{min(seconds):.1f} / {statistics.median(seconds):.1f} / {max(seconds):.1f} s, {max(memory):.0f} MB"
        )
    ratio = statistics.median(s for s, _ in taken["mine"]) / statistics.median(s for s, _ in taken["theirs"])
    share = max(m for _, m in taken["mine"]) / max(1.0, max(m for _, m in taken["theirs"]))
    print(f"| {what} | {cells[0]} | {cells[1]} | {ratio:.2f} | {share:.3f} |", flush=True)


def words(given: str | tuple[str, ...]) -> list[str]:
    """Fire makes a tuple of a list with commas."""
    return given.split(",") if isinstance(given, str) else list(given)


def bench(folder: str, only: str = "expand,consolidate,library,zero", sizes: str = "1B,4B", repeat: int = 3) -> None:
    """Prints the table."""
    work, parts = Path(folder).resolve(), words(only)
    work.mkdir(parents=True, exist_ok=True)
    print("| | ours: min / median / max, peak | the other | time ratio | memory ratio |\n|---|---|---|---|---|")
    for size in words(sizes):
        base = work / size if (work / size).exists() else make_base(work / size, size)
        grown, stock, copy = work / f"{size}-grown", work / f"{size}-stock", work / "copy"
        library = work / "library"
        added = sum(2 * s[0] * s[1] for n, s in shapes(size).items() if ".mlp." in n and "_proj" in n)
        if "expand" in parts:
            duel(f"expand {size}, against cp of the added bytes", grow("expand", base, grown),
                 copy_of(added, work), [grown, copy], repeat)  # fmt: skip
        if "consolidate" in parts:
            if not grown.exists():
                measure(*grow("expand", base, grown))
            total = added + sum(file.stat().st_size for file in base.glob("*.safetensors"))
            duel(f"consolidate {size}, against cp of the output's bytes", grow("consolidate", grown, stock),
                 copy_of(total, work), [stock, copy], repeat)  # fmt: skip
        for left in (grown, stock, copy, *work.glob("*.bytes")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        if "library" in parts and size == "1B":
            duel("expand and consolidate 1B, against transformers",
                 (sys.executable, "-c", BOTH, base, grown, stock), (sys.executable, "-c", LIBRARY, base, library),
                 [grown, stock, library], repeat)  # fmt: skip
            for left in (grown, stock, library):
                shutil.rmtree(left, ignore_errors=True)
    if "zero" in parts:
        zero3(work, repeat)


def zero3(work: Path, repeat: int) -> None:
    """ZeRO-3 of four ranks at the 1B's shape → fp32 safetensors, against DeepSpeed's own converter."""
    small, base = work / "small", work / "1B"
    if not small.exists():
        launch(make_tiny(work / "tiny", "text"), small, 4)
    like = small / "zero3-bf16-trained" / "second"
    prove(like, work)
    if not (work / "zero").exists():
        values = {name: noise(shape, "F32", i) for i, (name, shape) in enumerate(shapes("1B").items())}
        write_zero3(like, work / "zero" / "global_step1", values, 4)
    mine, theirs = work / "mine", work / "theirs"
    for what, cold in (("warm", []), ("cold", [work / "zero"])):
        duel(f"ZeRO-3, 4 ranks, 1B → fp32, {what} cache, against DeepSpeed",
             grow("consolidate", work / "zero", mine, "--start", base, "--dtype", "float32"),
             (sys.executable, "-c", DEEPSPEED, work / "zero", theirs), [mine, theirs], repeat, cold)  # fmt: skip
    measure(*grow("consolidate", work / "zero", mine, "--start", base, "--dtype", "float32"))
    print(f"\n{compare(mine, theirs)} tensors equal in both")


def prove(like: Path, work: Path) -> None:
    """The shards that we write for size are those that DeepSpeed would write: both readers find the same in both."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from grow.checkpoint.zero import ZeroCheckpoint

    shutil.rmtree(work / "again", ignore_errors=True)
    real = ZeroCheckpoint(like).trained
    write_zero3(like, work / "again" / "second", real, 4)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(work / "again"))
    mine = ZeroCheckpoint(work / "again").trained
    assert set(mine) == set(real) and set(theirs) >= set(real)
    assert all(torch.equal(mine[n].load(), v.load()) and torch.equal(theirs[n], v.load()) for n, v in real.items())


def compare(one: Path, other: Path) -> int:
    """How many tensors two folders of safetensors hold, all equal (a tied head apart)."""
    found = []
    for folder in (one, other):
        files = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
        found.append({name: file for file in files for name in file.keys() if name != "lm_head.weight"})  # noqa: SIM118
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(file.get_tensor(name), found[1][name].get_tensor(name)) for name, file in found[0].items())
    return len(found[0])


if __name__ == "__main__":
    fire.Fire(bench)
