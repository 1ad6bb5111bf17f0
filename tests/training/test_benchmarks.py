"""The benchmarks that a GPU and a quiet machine are needed for run to their end here, on shapes of nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT


def benchmark(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_a_gpu_is_needed_for(tmp_path: Path) -> None:
    """It notes each row, and goes on where it was."""
    out = tmp_path / "gpu.jsonl"
    arguments = ("--minutes", "5", "--sizes", "tiny", "--sequences", "2", "--out", out, "--only")
    table = benchmark("gpu", *arguments, "g_freeze,identity")
    rows = {line["row"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert rows["g_freeze"]["tokens_per_second"] > 0 and len(rows["g_freeze"]["kernels"]) == 10
    assert rows["identity"]["float32"]["identical"] and rows["identity"]["bfloat16"]["identical"]
    assert "| tiny | G-Freeze, all layers |" in table
    assert benchmark("gpu", *arguments, "g_freeze,identity") == table
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.full
def test_what_a_step_costs_the_host() -> None:
    found = json.loads(
        benchmark("host", "--json", "--only", "g_freeze", "--steps", "6", "--layers", "3", "--repeat", "1")
    )
    assert found["g_freeze"] > 0 and found["to_bare"]["g_freeze"] > 0 and set(found["milliseconds"]) == {
        "trainer", "bare_g_freeze", "g_freeze",
    }  # fmt: skip
