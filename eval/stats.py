"""Intervals for a mean score."""

import math
from collections.abc import Sequence

import numpy as np

from mm.common.seeds import rng

Z95 = 1.959963984540054


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean, 95 %."""
    if not len(values):
        return 0.0, 1.0
    x = np.asarray(values, dtype=np.float64)
    rows = rng(seed, "bootstrap", len(x)).integers(0, len(x), (draws, len(x)))
    low, high = np.percentile(x[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson where every value is 0 or 1, else bootstrap."""
    if all(v in (0.0, 1.0) for v in values):
        return wilson(sum(values), len(values))
    return bootstrap(values)


def normalised(value: float, floor: float, ceiling: float) -> float:
    """(value - floor) / (ceiling - floor); 0 where nothing lies between floor and ceiling."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else 0.0
