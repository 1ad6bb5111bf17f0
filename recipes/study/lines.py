"""LiNeS (arXiv 2410.17146), a rival: what training changed is scaled with depth, least at the bottom, where layers hold
what is general.

The update of layer l of L is multiplied by λ + (1 − λ) · l / (L − 1), l from 0; that of the embedding by λ, and what
stands above the layers keeps its own (equation 2 there, with α = λ and β = 1 − λ).
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from grow.checkpoint.lazy import interpolated
from grow.checkpoint.shards import SINGLE_NAME, Checkpoint
from grow.names import canonical, layer_of, mlp_prefixes


def scaled_by_depth(base: str, trained: Path, out: Path, lowest: float) -> None:
    """Writes OUT, a stock checkpoint between a base and what was trained of it; `lowest` is λ."""
    before, after = Checkpoint(base), Checkpoint(trained)
    top = len(mlp_prefixes(after.tensors)) - 1
    tensors = {}
    for name, info in after.tensors.items():
        layer = layer_of(name)
        depth = layer / top if layer is not None else float(not canonical(name).startswith("embed_tokens"))
        between = interpolated(before.lazy(name), after.lazy(name), lowest + (1 - lowest) * depth, info.dtype)
        tensors[name] = between.load()
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(trained, partial)
    save_file(tensors, partial / SINGLE_NAME, {"format": "pt"})
    partial.rename(out)
