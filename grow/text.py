"""What the commands say to a person, from the results that --json prints as they are."""

from typing import Any

from grow.plan import ranges


def plan_text(r: dict[str, Any]) -> str:
    """Of `plan` and `expand`."""
    added, base = r["added_parameters"], r["base_parameters"]
    trained = ", ".join(f"{count / 1e6:,.1f} M by {method}" for method, count in r["trained_parameters"].items())
    return (
        f"{r['base']}: {base / 1e6:,.1f} M parameters, {r['base_bytes'] / 1e9:.2f} GB\n"
        f"grown by a factor of {r['factor']}: {len(r['layers'])} layers ({ranges(r['layers'])})\n"
        f"added: {added / 1e6:,.1f} M parameters ({added / base:.0%} of the base), {r['added_bytes'] / 1e9:.2f} GB\n"
        f"trained: {trained}"
    )


def verify_text(r: dict[str, Any]) -> str:
    """Of `verify`."""
    lines = [f"{r['checkpoint']}: {r['tensors']} tensors, all as they should be"]
    for name, found in r.get("logits", {}).items():
        if found["difference"] == 0:
            lines.append(f"{name}: every logit equal to the base's, bit for bit")
        else:
            lines.append(
                f"{name}: logits differ by up to {found['difference']:.3g}, the largest is {found['largest']:.3g}"
            )
    return "\n".join(lines)


def train_text(r: dict[str, Any]) -> str:
    """Of `train`."""
    return (
        f"{r['run']}: {r['status']}, {r['steps']} steps, validation loss {r['validation_loss']:.3f}; "
        f"{r['frozen_unchanged']} frozen tensors bit-identical to the start"
    )


def eval_text(r: dict[str, Any]) -> str:
    """Of `eval`."""
    parts = [(part, r[part]) for part in ("task", "retention") if part in r]
    lines = [
        f"{part}: loss {s['loss']:.3f}, token accuracy {s['token_accuracy']:.1%}, exact {s['exact_match']:.1%}, "
        f"log-likelihood {s['log_likelihood']:.2f} over {s['rows']} rows"
        for part, s in parts
    ]
    lines += [f"{sample['prompt']} {sample['output']}" for sample in r["samples"]]
    return "\n".join(lines)


class Bar:
    """A progress bar in bytes, on a terminal only."""

    def __init__(self, what: str):
        from tqdm import tqdm

        self._bar = tqdm(desc=what, unit="B", unit_scale=True, leave=False, disable=None)

    def add(self, count: int, total: int) -> None:
        """So many bytes more, of so many in all."""
        self._bar.total = total
        self._bar.update(count)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
