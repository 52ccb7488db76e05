"""What a claim is: numbers, how one seed is run, and which paired differences over seeds decide it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

Row = dict[str, Any]  # what one seed measured, as JSON
Cell = tuple[float, float] | None  # mean and deviation over seeds
Lines = dict[str, list[Cell]]  # a table: name of a line -> its cells
Tick = Callable[[], None]  # called once per training step; raises `Asked` when the run should stop
Verdict = Literal["holds", "does not hold", "undecided"]


class Asked(Exception):
    """Ctrl-C: this seed stops here and begins anew next time."""


@dataclass(frozen=True)
class Contrast:
    """A paired difference, one number per seed; above 0 speaks for the claim.

    decides: the claim's verdict needs it; others are printed for what they tell.
    """

    name: str
    says: str
    of: Callable[[Row], float]
    decides: bool = False


@dataclass(frozen=True)
class Effect:
    """A contrast over seeds: mean and its 95 % t interval (None below two seeds)."""

    name: str
    says: str
    values: list[float]
    mean: float
    low: float | None
    high: float | None
    decides: bool
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """A published finding and how it is repeated.

    config: a dataclass of plain numbers, saved with the result; another config needs another folder.
    prepare(config, folder, quiet): what all seeds share, kept in `folder`; called before them, cheap when done.
    seed(config, seed, folder, tick): one seed's row, a pure function of config and seed.
    steps(config): how often one seed ticks. columns: what a line of the table measures. table(rows): the lines,
    floors and ceilings included. notes(rows): what a reader should know besides. plotted: the first so many columns
    are plotted; lines in `dashed` (floors, ceilings) are dashed there, those in `hidden` would squash the scale.
    """

    name: str
    says: str
    source: str
    cost: str
    config: Any
    prepare: Callable[[Any, Path, bool], None]
    seed: Callable[[Any, int, Path, Tick], Row]
    steps: Callable[[Any], int]
    contrasts: tuple[Contrast, ...]
    unit: str
    columns: tuple[str, ...]
    table: Callable[[list[Row]], Lines]
    notes: Callable[[list[Row]], list[str]]
    plotted: int
    dashed: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    quiet: bool = False


def interval(values: list[float], share: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean; None below two values."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stats.t.ppf(0.5 + share / 2, len(values) - 1)) * error
    return mean - half, mean + half


def verdict_of(bounds: tuple[float, float] | None) -> Verdict:
    """From the interval of a difference that the claim says is not below 0."""
    if bounds is None:
        return "undecided"
    if bounds[0] >= 0:
        return "holds"
    return "does not hold" if bounds[1] < 0 else "undecided"


def effect(contrast: Contrast, rows: list[Row]) -> Effect:
    values = [contrast.of(r) for r in rows]
    bounds = interval(values)
    low, high = bounds or (None, None)
    return Effect(
        contrast.name, contrast.says, values, float(np.mean(values)), low, high, contrast.decides, verdict_of(bounds)
    )


def decide(effects: list[Effect]) -> Verdict:
    """Holds when every deciding effect does; does not hold when one of them does not; else undecided."""
    verdicts = {e.verdict for e in effects if e.decides}
    if verdicts == {"holds"}:
        return "holds"
    return "does not hold" if "does not hold" in verdicts else "undecided"


def spread(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation over seeds; 0 for one)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def constant(value: float, n: int) -> list[Cell]:
    """n cells that do not depend on the seed."""
    return [(value, 0.0)] * n
