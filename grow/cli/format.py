"""Texts for people, made from the results that --json prints as they are."""

import json as json_module
from collections.abc import Callable
from typing import Any


def plan_text(r: dict[str, Any]) -> str:
    """Returns the text of `plan` and `expand`."""
    added, base = r["added_parameters"], r["base_parameters"]
    trained = ", ".join(f"{count / 1e6:,.1f} M by {method}" for method, count in r["trained_parameters"].items())
    return (
        f"{r['base']}: {base / 1e6:,.1f} M parameters, {r['base_bytes'] / 1e9:.2f} GB\n"
        f"grown: {r['grown']}\n"
        f"added: {added / 1e6:,.1f} M parameters ({added / base:.0%} of the base), {r['added_bytes'] / 1e9:.2f} GB\n"
        f"trained: {trained}"
    )


def memory_text(r: dict[str, Any]) -> str:
    """Returns the text of `plan` for a recipe."""
    parts = ("weights", "gradients", "optimizer")
    lines = [
        *([f"grown: {r['grown']}"] if "grown" in r else []),
        f"{r['method']}: trains {r['trained_parameters'] / 1e6:,.1f} M of {r['parameters'] / 1e6:,.1f} M parameters, "
        f"in {r['dtype']}; GB on each of {r['world_size']} GPUs:",
        f"{'ZeRO':<20}" + "".join(f"{part:>11}" for part in (*parts, "together", "on host", "sent/step")),
    ]
    for stage, states in r["stages"].items():
        sent = r["moved"][stage.split()[0]]["sent"]
        sizes = [*(states[part] for part in parts), sum(states[part] for part in parts), states.get("host", 0), sent]
        name = f"{stage}, the recipe's" if stage == str(r["stage"]) else stage
        lines.append(f"{name:<20}" + "".join(f"{size / 1e9:>11.2f}" for size in sizes))
    lines += [
        f"and, estimated: {r['activations_estimate'] / 1e9:.2f} GB of activations and logits, up to "
        f"{r['buckets_estimate'] / 1e9:.2f} GB to reduce gradients in",
        *([_fitting(r)] if "largest_micro_batch" in r else []),
        f"disk: {r['disk_bytes'] / 1e9:.2f} GB, checkpoints of {r['checkpoint_bytes'] / 1e9:.2f} GB",
        f"to leave with a checkpoint: {r['lead_seconds']} s at {r['disk_rate'] / 1e9:g} GB/s (assumed), plus one step: "
        "for Slurm's --signal",
    ]
    return "\n".join(lines)


def _fitting(r: dict[str, Any]) -> str:
    sizes = [f"ZeRO-{stage} {size or 'does not fit'}" for stage, size in r["largest_micro_batch"].items()]
    return (
        f"on a GPU of {r['gpu_bytes'] / 1e9:g} GB the largest per_device_train_batch_size is, estimated: "
        f"{', '.join(sizes)}"
    )


def verify_text(r: dict[str, Any]) -> str:
    """Returns the text of `verify`."""
    lines = [f"{r['checkpoint']}: {r['tensors']} tensors, all as they should be"]
    if "copies_from" in r:
        from grow.checkpoint.card import copies_start  # not for the help, which is to be quick

        start = copies_start(r["factor"])
        lines.append(f"its copies came from {r['copies_from']}: it starts at {start}; at α = 0:")
    elif r["trained"] and "logits" in r:
        lines.append("it is trained; at α = 0:")
    for name, found in r.get("logits", {}).items():
        if "left_out" in found:
            lines.append(f"{name}: not compared, {found['left_out']}")
        elif found["difference"] == 0:
            lines.append(f"{name}: every logit equal to the base's, bit for bit")
        else:
            lines.append(
                f"{name}: logits differ by up to {found['difference']:.3g}, the largest is {found['largest']:.3g}"
            )
    return "\n".join(lines)


def train_text(r: dict[str, Any]) -> str:
    """Returns the text of `train`."""
    counts = f" at the last (the mean of {r['average']} checkpoints counts)" if "average" in r else ""
    return (
        f"{r['run']}: {r['status']}, {r['steps']} steps, validation loss {r['validation_loss']:.3f}{counts}; "
        f"{r['frozen_unchanged']} frozen tensors bit-identical to the start"
    )


def eval_text(r: dict[str, Any]) -> str:
    """Returns the text of `eval`."""
    lines = []
    for point in r.get("by_alpha", [r]):
        lines += [f"α = {point['alpha']:g}"] if "by_alpha" in r else []
        sets = {part: point[part] for part in ("task", "retention") if part in point} | point.get("retention_sets", {})
        lines += [_scores_text(name, scores) for name, scores in sets.items()]
        for task, metrics in point.get("lm_eval", {}).items():
            lines += [f"{task}: {name} {figure_text(m, 'value')} over {m['rows']} rows" for name, m in metrics.items()]
    lines += [f"{sample['prompt']} {sample['output']}" for sample in r.get("samples", [])]
    return "\n".join(lines)


def figure_text(scores: dict[str, Any], key: str, form: str = ".3f") -> str:
    """Returns a figure with its 95 % interval, such as 0.512 [0.480, 0.544]."""
    bounds = scores.get("intervals", {}).get(key) or scores.get("interval")
    text = format(scores[key], form)
    return text + (f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "")


def _scores_text(name: str, s: dict[str, Any]) -> str:
    parts = [
        f"loss {figure_text(s, 'loss')}",
        f"token accuracy {figure_text(s, 'token_accuracy', '.1%')}",
        f"exact {figure_text(s, 'exact_match', '.1%')}",
        f"log-likelihood {figure_text(s, 'log_likelihood', '.2f')}",
    ]
    if "accuracy" in s:
        fewer = f" over {s['accuracy_rows']} rows" if s.get("accuracy_rows", s["rows"]) != s["rows"] else ""
        parts.append(f"accuracy {figure_text(s, 'accuracy', '.1%')}{fewer}")
    parts += [f"{key} {figure_text(s, key, '.1f')}" for key in ("chrf", "bleu") if key in s]
    if "kl" in s:
        parts.append(
            f"KL {figure_text(s, 'kl', '.4f')}, identical to the base on {s['identical_rows']:,} of {s['rows']:,}"
        )
    if "opened" in s:
        parts.append(f"switch open for {s['opened']:.1%}")
    if "generation" in s:
        written = s["generation"]
        shots = f" after {written['shots']} others" if written["shots"] else ""
        parts.append(
            f"written{shots}: exact {figure_text(written, 'exact_match', '.1%')}, "
            f"begins with it {figure_text(written, 'begins', '.1%')} of {written['rows']}"
        )
    if "from_base" in s:
        parts.append(f"from the base {figure_text(s['from_base'], 'log_likelihood', '+.3f')}")
    left_out = f", {s['contaminated']} left out as contaminated by training rows" if s["contaminated"] else ""
    unusable = f", {s['unusable']} left out as they cannot be used" if s.get("unusable") else ""
    return f"{name}: {', '.join(parts)} over {s['rows']} rows{left_out}{unusable}"


def _by(margin: float | None) -> str:
    """Says by how much a switch's score is above or below its threshold, in its own unit."""
    return "" if margin is None else f", {abs(margin):.2f} {'above' if margin > 0 else 'below'} its threshold"


def answer_text(r: dict[str, Any]) -> str:
    """Returns what `chat` says after an answer, which has been printed as it was written."""
    lines = [] if r["on"] is None else [f"[the skill was {'on' if r['on'] else 'off'}{_by(r['margin'])}]"]
    if isinstance(r["on"], list):
        lines = [f"[skills that were on: {', '.join(r['on']) or 'none'}]"]
    return "\n".join(lines if r["base"] is None else [*lines, f"[the base: {r['base']}]"])


def alpha_text(r: dict[str, Any]) -> str:
    """Returns the text of `find-alpha`."""
    lines = [f"α = {point['alpha']:<6g} KL {figure_text(point, 'kl', '.5f')}" for point in r["seen"]]
    lines += ["with its switch on, as what is consolidated is"] * r["switched"]
    lines += [
        f"largest α with KL(base ‖ model) ≤ {r['max_kl']:g} nats a token: {r['alpha']:g}; KL "
        f"{figure_text(r, 'kl', '.5f')} (95 %) over {r['passages']} passages, {r['tokens']} tokens of {r['text']}",
        r["next"],
    ]
    return "\n".join(lines)


def layer_alphas_text(r: dict[str, Any]) -> str:
    """Returns the text of `learn-alphas`."""
    lines = [f"layer {layer:<3} α = {alpha:g}" for layer, alpha in zip(r["layers"], r["alphas"], strict=True)]
    lines += [f"{what}: {r[key][0]:.3f} at first, {r[key][1]:.3f} at the end" for what, key in _LEARNT]
    return "\n".join([*lines, f"written: {r['out']}"])


_LEARNT = (("task loss, nats per token", "task_loss"), ("KL from the base, nats per token", "kl"))


class Bar:
    """Shows a progress bar in bytes, on a terminal only."""

    def __init__(self, what: str):
        from tqdm import tqdm

        self._bar = tqdm(desc=what, unit="B", unit_scale=True, leave=False, disable=None)

    def add(self, count: int, total: int) -> None:
        """Adds bytes that are done, `count` of `total`."""
        self._bar.total = total
        self._bar.update(count)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def say(result: dict[str, Any], text: Callable[[dict[str, Any]], str], json: bool) -> str:
    """Returns a result as one JSON object, or as text."""
    return json_module.dumps(result) if json else text(result)
