"""Sources and weights -> one infinite seeded order of draws, a pure function of (fingerprint, seed, position).

Which source: in every period of 65,536 draws each source comes its exact number of times, spread evenly.
Which sample: per source and epoch, blocks of neighbouring samples are permuted, then samples are shuffled
inside a window of a few blocks, so that shards are read in long runs and every sample comes once an epoch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_mix.shards import Source
from mm.common.errors import UserError
from mm.common.seeds import rng

PERIOD = 65_536  # draws after which every source has had its exact share
BLOCK = 32  # neighbouring samples that stay together
WINDOW = 16  # blocks that are shuffled together


class Draw(NamedTuple):
    """Sample number `sample` of source number `source` in its epoch `epoch`."""

    source: int
    sample: int
    epoch: int


@dataclass(frozen=True)
class SourceSpec:
    """A source folder and its weight. The unit says what the weight is a share of, before packing."""

    path: str | Path
    weight: float = 1.0
    unit: Literal["tokens", "samples"] = "tokens"


class Mix:
    """`draw(position)` for any position >= 0, at the cost of a table look-up.

    Weights in tokens need each source's mean length: `bind` gives it (PackPlan does). Weights need not sum to 1.
    Raises UserError for no source, an empty source, a weight that is not above 0, or two units in one mix.
    """

    def __init__(self, sources: Sequence[SourceSpec], seed: int = 0):
        if not sources:
            raise UserError("the mix has no source; name at least one source folder")
        for s in sources:
            if not s.weight > 0:
                raise UserError(f"{s.path}: weight {s.weight} must be above 0; leave the source out instead")
        units = {s.unit for s in sources}
        if len(units) > 1 or units - {"tokens", "samples"}:
            raise UserError(f"weights of one mix share a unit, tokens or samples; here: {', '.join(sorted(units))}")
        self.specs, self.seed, self.unit = list(sources), seed, units.pop()
        self.sources = [Source(s.path) for s in sources]
        everything = [np.arange(len(s), dtype=np.int64) for s in self.sources]
        self.bind(everything, [1.0] * len(everything) if self.unit == "samples" else None)

    def bind(self, usable: list[np.ndarray], mean_tokens: list[float] | None) -> None:
        """Draw only the `usable` sample numbers of each source; `mean_tokens` over them turns token weights
        into draw rates (None: not known yet)."""
        for source, samples in zip(self.sources, usable, strict=True):
            if not len(samples):
                raise UserError(f"source {source.name!r} ({source.folder}) has no sample that can be used")
        self._usable = usable
        self._rates: np.ndarray | None = None
        if mean_tokens is not None:
            means = np.asarray(mean_tokens) if self.unit == "tokens" else np.ones(len(self.sources))
            rates = np.array([s.weight for s in self.specs]) / means
            self._rates = _per_period(rates / rates.sum())
        self._period = lru_cache(maxsize=3)(self._make_period)
        self._blocks = lru_cache(maxsize=4 * len(self.sources))(self._make_blocks)
        self._window = lru_cache(maxsize=4 * len(self.sources))(self._make_window)

    @property
    def fingerprint(self) -> str:
        """Changes with the data, the weights, their unit, the seed and the samples that may be drawn."""
        facts = [
            [s.fingerprint, spec.weight, hashlib.sha256(usable.tobytes()).hexdigest()]
            for s, spec, usable in zip(self.sources, self.specs, self._usable, strict=True)
        ]
        text = json.dumps(["mix-1", PERIOD, BLOCK, WINDOW, self.unit, self.seed, facts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def draw(self, position: int) -> Draw:
        if self._rates is None:
            raise UserError("weights in tokens need the samples' lengths; draw through a PackPlan, or give "
                            "the weights in samples")  # fmt: skip
        period, at = divmod(position, PERIOD)
        order, nth = self._period(period)
        source = int(order[at])
        n = period * int(self._rates[source]) + int(nth[at])
        epoch, n = divmod(n, len(self._usable[source]))
        return Draw(source, self._sample(source, epoch, n), epoch)

    def name(self, draw: Draw) -> str:
        """'source/shard/key#epoch', for the log and for error messages."""
        source = self.sources[draw.source]
        key = source.row(draw.sample)["key"]
        return f"{source.name}/{source.shard_of(draw.sample)}/{key}#{draw.epoch}"

    def _make_period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw in a period: its source, and how many draws of that source came before it."""
        assert self._rates is not None
        counts, random = self._rates, rng(self.seed, "period", period)
        source = np.repeat(np.arange(len(counts)), counts)
        nth = np.concatenate([np.arange(c) for c in counts])
        order = np.argsort((nth + random.random(PERIOD)) / counts[source], kind="stable")
        return source[order], nth[order]

    def _make_blocks(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks, and where each window of WINDOW blocks starts in the epoch."""
        length = len(self._usable[source])
        blocks = -(-length // BLOCK)
        order = rng(self.seed, "blocks", source, epoch).permutation(blocks)
        sizes = np.minimum(BLOCK, length - order * BLOCK)
        return order, np.concatenate([[0], np.cumsum(sizes)])[::WINDOW]

    def _make_window(self, source: int, epoch: int, window: int) -> np.ndarray:
        order, usable = self._blocks(source, epoch)[0], self._usable[source]
        blocks = order[window * WINDOW : (window + 1) * WINDOW]
        samples = np.concatenate([usable[b * BLOCK : (b + 1) * BLOCK] for b in blocks])
        return rng(self.seed, "window", source, epoch, window).permutation(samples)

    def _sample(self, source: int, epoch: int, n: int) -> int:
        starts = self._blocks(source, epoch)[1]
        window = int(np.searchsorted(starts, n, side="right")) - 1
        return int(self._window(source, epoch, window)[n - starts[window]])


def _per_period(shares: np.ndarray) -> np.ndarray:
    """Whole draws per period by largest remainder; at least one each, however small the weight."""
    exact = shares * PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: max(PERIOD - counts.sum(), 0)]:
        counts[i] += 1
    counts[counts.argmax()] += PERIOD - counts.sum()
    return counts
