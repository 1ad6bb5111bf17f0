"""When capacity pays: a full model learns as much again, by fine-tuning, by LoRA and by growth.

    python recipes/study/capacity.py --out results [--seeds 0,1,2] [--pairs 8192] [--steps 1500]

A Gemma 3 of some 70 thousand parameters learns pairs, two tokens → two tokens, until it learns no more: about two bits
a parameter (arXiv 2404.05405), so the number of pairs is what fills it. Then it learns as many new pairs, held near
itself by KL(before ‖ after) on sequences that it writes by itself, at several weights; each method at the best of its
rates. Fine-tuning and LoRA have the capacity that there is; growth adds some. Writes OUT/capacity.json, .md and .png;
what is there already is not run again.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from tqdm import trange
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import grow
from grow.analysis.figures import markdown, new_figure, write_figure
from grow.checkpoint.files import write_json, write_text
from grow.cli.arguments import run_script

SYMBOLS, BOS = 256, 256
WEIGHTS = (0.0, 1.0, 5.0)
"""Of the KL term."""
METHODS: dict[str, tuple[str, int, tuple[float, ...]]] = {
    "SFT": ("sft", 1, (1e-3,)),
    "LoRA": ("lora", 1, (1e-2,)),
    "growth, k = 2": ("g_freeze", 2, (2e-3,)),
    "growth, k = 4": ("g_freeze", 4, (2e-3,)),
    "G-Train, k = 2": ("g_train", 2, (2e-3,)),
}
_BATCH, _OWN = 512, 32_768


@dataclass(frozen=True)
class Result:
    """Holds what a method knows after it has learnt: nats and exact answers, of old pairs and of new ones."""

    method: str
    rate: float
    kl_weight: float
    seed: int
    parameters: int
    old_loss: float
    new_loss: float
    old_exact: float
    new_exact: float


def capacity(out: str, seeds: str = "0", pairs: str = "8192", steps: str = "1500") -> None:
    """Runs all methods, weights and rates, and writes the table and the picture."""
    file, count = Path(out) / "capacity.json", int(pairs)
    found = json.loads(file.read_text()) if file.exists() else {"full": {}, "runs": []}
    for seed in seeds.split(","):
        old, new = made_up(count, int(seed))
        full = small_model(int(seed))
        learn(full, old, [*full.parameters()], 2e-3, 4 * int(steps), int(seed), f"seed {seed}: until it is full")
        found["full"][seed] = dict(zip(("loss", "exact"), knows(full, old), strict=True))
        own = sampled(full, _OWN, int(seed))
        done = {(run["method"], run["rate"], run["kl_weight"], run["seed"]) for run in found["runs"]}
        for name, (method, factor, rates) in METHODS.items():
            for rate in rates:
                for weight in WEIGHTS:
                    if (name, rate, weight, int(seed)) in done:
                        continue
                    model, trained = prepared(full, method, factor)
                    what = f"seed {seed}: {name}, {rate:g}, KL {weight:g}"
                    learn(model, new, trained, rate, int(steps), int(seed), what, (full, own, weight))
                    (old_loss, old_exact), (new_loss, new_exact) = knows(model, old), knows(model, new)
                    size = sum(p.numel() for p in model.parameters())
                    result = Result(
                        name, rate, weight, int(seed), size, old_loss, new_loss, old_exact, new_exact
                    )  # fmt: skip
                    found["runs"].append(asdict(result))
                    write_json(file, found)
    write_text(Path(out) / "capacity.md", table(found))
    draw(found, Path(out) / "capacity.png")
    print(table(found))


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns old and new pairs as sequences BOS, key, key, value, value, int64 [count, 5]; no key is in both."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randperm(SYMBOLS**2, generator=draw)[: 2 * count]
    values = torch.randint(SYMBOLS, (2 * count, 2), generator=draw)
    begin = torch.full_like(keys, BOS)
    rows = torch.stack([begin, keys // SYMBOLS, keys % SYMBOLS, *values.unbind(1)], 1)
    return rows[:count], rows[count:]


def small_model(seed: int) -> Any:
    """Returns a Gemma 3 of three layers, untrained."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=SYMBOLS + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=24, max_position_embeddings=16, sliding_window=16, tie_word_embeddings=True,
        bos_token_id=BOS, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def prepared(full: Any, method: str, factor: int) -> tuple[Any, list[nn.Parameter]]:
    """Returns a copy of the full model as a method has it, and what it trains."""
    model = copy.deepcopy(full)
    if method in ("g_freeze", "g_train"):
        grow.grow_model(model, factor=factor)
        return model, grow.trainable(model, method)
    if method == "lora":
        targets = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in name]
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=targets), model)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def learn(
    model: Any,
    rows: Tensor,
    trained: list[nn.Parameter],
    rate: float,
    steps: int,
    seed: int,
    what: str,
    near: tuple[Any, Tensor, float] | None = None,
) -> None:
    """Trains on the rows, all tokens after BOS; `near` is a model, its own sequences, and the weight of KL from it."""
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    batches, own = _batches(rows, seed), _batches(near[1], seed) if near and near[2] else None
    model.train()
    for _ in trange(steps, desc=what, leave=False, disable=None):
        loss = _losses(model, next(batches)).mean()
        if near and own:
            batch = next(own)
            with torch.no_grad():
                expected = near[0](input_ids=batch[:, :-1]).logits.log_softmax(-1)
            now = model(input_ids=batch[:, :-1]).logits.log_softmax(-1)
            loss = loss + near[2] * (expected.exp() * (expected - now)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _batches(rows: Tensor, seed: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(rows), generator=draw).split(_BATCH):
            yield rows[part]


def _losses(model: Any, rows: Tensor) -> Tensor:
    """Returns the loss of each token after BOS, [B, 4]."""
    logits = model(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(
        len(rows), -1
    )


@torch.no_grad()
def knows(model: Any, rows: Tensor) -> tuple[float, float]:
    """Returns nats a value's token, and the share of rows of which both tokens of the value are the likeliest."""
    logits = torch.cat([model(input_ids=part[:, :-1]).logits[:, 2:] for part in rows.split(_BATCH)])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 3:].flatten())
    return float(loss), float((logits.argmax(-1) == rows[:, 3:]).all(1).double().mean())


@torch.no_grad()
def sampled(model: Any, count: int, seed: int) -> Tensor:
    """Returns sequences that a model writes by itself from BOS at temperature 1, int64 [count, 5]."""
    torch.manual_seed(seed)
    rows = torch.full((count, 1), BOS)
    for _ in range(4):
        logits = torch.cat([model(input_ids=part).logits[:, -1] for part in rows.split(4096)])
        rows = torch.cat([rows, torch.multinomial(logits.softmax(-1), 1)], 1)
    return rows


def fronts(found: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Returns, for each method and KL weight, the means over seeds at the rate with the least sum of both losses."""
    best: dict[str, list[dict[str, float]]] = {}
    keys = ("old_loss", "new_loss", "old_exact", "new_exact", "parameters")
    for name, (_, _, rates) in METHODS.items():
        for weight in WEIGHTS:
            points = []
            for rate in rates:
                same = [r for r in found["runs"] if (r["method"], r["rate"], r["kl_weight"]) == (name, rate, weight)]
                if same:
                    means = {key: fmean(run[key] for run in same) for key in keys}
                    points.append(means | {"rate": rate, "kl_weight": weight, "seeds": len(same)})
            if points:
                best.setdefault(name, []).append(min(points, key=lambda p: p["old_loss"] + p["new_loss"]))
    return best


def table(found: dict[str, Any]) -> str:
    """Returns a row for each method and KL weight."""
    full = list(found["full"].values())
    header = ["", "parameters", "KL weight", "rate", "old pairs, loss", "exact", "new pairs, loss", "exact"]
    rows = [["before", "", "", "", f"{fmean(f['loss'] for f in full):.3f}", f"{fmean(f['exact'] for f in full):.1%}"]]
    rows[0] += ["", ""]
    for name, points in fronts(found).items():
        for p in points:
            row = [name, f"{p['parameters']:,.0f}", f"{p['kl_weight']:g}", f"{p['rate']:g}", f"{p['old_loss']:.3f}"]
            rows.append([*row, f"{p['old_exact']:.1%}", f"{p['new_loss']:.3f}", f"{p['new_exact']:.1%}"])
    seeds = len(full)
    return markdown(header, rows) + f"\nMeans of {seeds} seed{'s' * (seeds > 1)}; nats a token of a value.\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws what is left of the old pairs over what is known of the new ones, a line for each method."""
    figure, axes = new_figure(7.5, 5.2)
    for place, (name, points) in enumerate(fronts(found).items()):
        x, y = ([100 * p[key] for p in points] for key in ("new_exact", "old_exact"))
        axes.plot(x, y, "o-", color=f"C{place}", markersize=5)
        axes.annotate(
            name, (x[0], y[0]), (4, 5), textcoords="offset points", color=f"C{place}", fontsize=9, rotation=50,
            rotation_mode="anchor",
        )  # fmt: skip
    before = 100 * fmean(f["exact"] for f in found["full"].values())
    axes.axhline(before, color="grey", linewidth=0.8)
    axes.annotate("before ", (1, before), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey")
    axes.set(xlabel="new pairs that are known, %", ylabel="old pairs that are still known, %")
    axes.grid(alpha=0.3)
    write_figure(path, figure)


if __name__ == "__main__":
    run_script(capacity, str(__doc__))
