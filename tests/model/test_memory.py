"""Memory on a CPU is kept from step to step, and what it keeps is bounded."""

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers.tiny import ROOT

STEPS = """
import json, psutil, torch
from grow.model.memory import MallocTrimmer, tune_malloc

tune_malloc()
trimmer, taken, small = MallocTrimmer(), [], []
start = psutil.Process().memory_info().rss
for step in range(8):
    large = [torch.ones(2**20 + 2**18 * step) for _ in range(40)]  # each step's do not fit into the last one's holes
    small += [torch.ones(2**12) for _ in range(40)]
    middle = [torch.ones(2**20 + 2**18 * step) for _ in range(40)]
    del large, middle
    if bound:
        trimmer.trim()
    taken.append((psutil.Process().memory_info().rss - start) / 2**20)
print(json.dumps(taken))
"""


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="memory on a CPU, with glibc")
def test_memory_is_kept_and_its_holes_are_given_back() -> None:
    def taken(bound: bool) -> list[float]:
        """MiB after each step, of which nothing but a few small tensors is in use."""
        script = f"bound = {bound}\n{STEPS}"
        ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
        found: list[float] = json.loads(ran.stdout)
        return found

    kept, bounded = taken(False), taken(True)
    assert kept[0] > 300, "what was freed stays with the process"
    assert max(kept) == pytest.approx(kept[-1], rel=0.01), "and never leaves"
    assert bounded[0] > 300, "one step's worth stays"
    assert min(bounded[1:]) < 100, "holes leave once they have grown to much"
    assert max(bounded) < max(kept)
