"""The detector behind a switch: a linear support vector machine, and a threshold set by rows (split conformal).

    min ½ |w|² + C Σ cᵢ max(0, 1 − yᵢ (w · xᵢ + b))²        x scaled to a variance of 1, classes of equal weight

The squared hinge is the best of those that recipes/study/switch.md compares: near sets that it has not seen stay shut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OPEN, SHUT = 0.99, 0.999
"""The share of the task's held-out rows that a threshold leaves open, and that of other tokens that it leaves shut."""


@dataclass(frozen=True)
class Detector:
    """Scores features [N, h] as x · weight + bias, fp64 [N]; `weight` is [h]."""

    weight: Tensor
    bias: float

    def scores(self, x_NH: Tensor) -> Tensor:
        """Returns the scores, [N]."""
        return x_NH.double() @ self.weight + self.bias


def fit(on: Sequence[Tensor], off: Sequence[Tensor]) -> Detector:
    """Fits a detector to kinds of text, each [N, h], that are to be on, and of those that are to be off."""
    from sklearn.svm import LinearSVC  # takes a second to import, which runs without a switch need not wait for

    x = torch.cat([*on, *off]).double()
    scale = x.std(0) + 1e-6
    machine = LinearSVC(C=0.01, class_weight="balanced", max_iter=5000, dual=False)
    machine.fit((x / scale).numpy(), [1] * sum(map(len, on)) + [0] * sum(map(len, off)))
    return Detector(torch.from_numpy(machine.coef_[0]) / scale, float(machine.intercept_[0]))


@dataclass(frozen=True)
class Threshold:
    """Holds a threshold on scores, and what held-out rows say of it: `opened` of `off_rows` rows that should stay shut
    were above it, `shut` of `on_rows` rows of the task were not."""

    value: float
    opened: int
    off_rows: int
    shut: int
    on_rows: int

    @property
    def opens_at_most(self) -> float:
        """Returns the bound on the chance that a further row, of the kinds that should stay shut, opens: (opened + 1) /
        (rows + 1), from the exchangeability of held-out rows (Vovk et al. 2005, split conformal prediction)."""
        return (self.opened + 1) / (self.off_rows + 1)

    @property
    def open(self) -> float:
        """Returns the share of the task's held-out rows that open."""
        return 1 - self.shut / self.on_rows


def threshold(on_N: Tensor, off_N: Tensor, by_others: bool = False) -> Threshold:
    """Sets the threshold from the scores of held-out rows, which had no part in the fit.

    It leaves 99 % of the task's rows open, and no more than that: the higher it lies, the less else opens. `by_others`:
    it leaves 99.9 % of the others shut, as is needed where every token of a text decides for itself.
    """
    if by_others:
        value = float(off_N.sort().values[math.ceil(SHUT * len(off_N)) - 1])
        return Threshold(value, int((off_N > value).sum()), len(off_N), int((on_N <= value).sum()), len(on_N))
    value = math.nextafter(float(on_N.sort().values[math.floor((1 - OPEN) * len(on_N))]), -math.inf)
    return Threshold(value, int((off_N > value).sum()), len(off_N), int((on_N <= value).sum()), len(on_N))


def auroc(on_N: Tensor, off_N: Tensor) -> float:
    """Returns the area under the ROC curve: the chance that a row of the task scores higher than another."""
    above = (on_N[:, None] > off_N).double().mean() + (on_N[:, None] == off_N).double().mean() / 2
    return float(above)
