"""95 % intervals of figures that are means over items, or ratios of sums over them, by the bootstrap.

Items are drawn again, with replacement, as many as there are; the interval lies between the 2.5th and the 97.5th
percentile of the draws' figures (Efron 1979; the percentile method). Draws depend on the seed and the number of items
alone, so figures of the same items are compared draw by draw.
"""

from collections.abc import Sequence

import numpy as np

DRAWS = 1000
_AT_A_TIME = 50


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Returns the interval of Σ values / Σ weights over the items; without weights, of their mean. For one item it is a
    point."""
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    generator, count = np.random.default_rng(seed), len(numerators)
    found = []
    for begin in range(0, draws, _AT_A_TIME):
        drawn = generator.integers(0, count, (min(_AT_A_TIME, draws - begin), count))
        found.append(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
