"""Share of the training time in which the engine stands still for data, with and without a warm cache.

Real steps of keye.s2_multitask at tiny (every task of the world, pictures and clips) through the engine's own
loop, the time waited from the loader's own count. The first steps are left out: they hold the start of the
decode processes and of the engine. A third case holds the same batches in memory: what a step takes with no
loader beside it, for waiting is not all that a loader can cost where it shares the cores.

    python benchmarks/data_wait.py --world WORLD
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness

from data_mix.loader import Loader
from mm.sizes import PROCESSORS
from mm.tokenizer import Tokenizer
from stages.engine.train import train
from stages.keye.recipe import STAGES
from stages.keye.run import Means, build, load_data
from stages.stage import Checkpoints, Stage

GOAL = 0.03


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--world", type=Path, required=True, help="a world folder (mm data make-world)")
    p.add_argument("--stage", choices=list(STAGES), default="keye.s2_multitask")
    p.add_argument("--steps", type=int, default=40, help="timed steps of each round")
    p.add_argument("--warmup", type=int, default=4)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, default=1)
    return p.parse_args(argv)


class Enough(Exception):
    """The timed steps are over."""


class Timed:
    """A loader that notes the clock and its own waiting at every step, and ends after `steps`."""

    def __init__(self, loader: Loader, steps: int, held: bool):
        self.loader, self.steps = loader, steps
        self.batches: Iterator[Any] = iter([next(loader) for _ in range(steps)]) if held else iter(loader)
        if held:
            loader.close()
        self.clock: list[float] = []
        self.waited: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for k in range(self.steps + 1):
            self.clock.append(time.perf_counter())
            self.waited.append(self.loader.stats.wait_seconds)
            if k == self.steps:
                raise Enough
            yield next(self.batches)

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def load(self, state: dict[str, Any]) -> None:
        self.loader.load(state)


def run(a: argparse.Namespace, stage: Stage, tokenizer: Tokenizer, cache: Path | None, held: bool = False):
    """Figures of one round."""
    means = Means({"world": a.world}, {}, cache=cache, workers=a.workers, quiet=True)
    model = build(replace(stage, start=["scratch"]), tokenizer, means)
    with tempfile.TemporaryDirectory() as folder, load_data(stage, tokenizer, PROCESSORS["tiny"], means) as loader:
        timed = Timed(loader, a.warmup + a.steps, held)
        with contextlib.suppress(Enough):
            train(stage, folder, model=model, loader=timed, hand_on=lambda *_: None, quiet=True)
        stats, w = loader.stats, a.warmup
        seconds = timed.clock[-1] - timed.clock[w]
        asked = stats.cache_hits + stats.cache_misses
        return {"wait_share": (timed.waited[-1] - timed.waited[w]) / seconds, "step_ms": 1e3 * seconds / a.steps,
                "cache_hits": stats.cache_hits / max(asked, 1), "bad": sum(stats.bad.values())}  # fmt: skip


def warm(a: argparse.Namespace, stage: Stage, tokenizer: Tokenizer, cache: Path) -> None:
    """Everything the runs will ask for, and what the loader asks ahead, decoded once."""
    means = Means({"world": a.world}, {}, cache=cache, workers=a.workers, quiet=True)
    with load_data(stage, tokenizer, PROCESSORS["tiny"], means) as loader:
        for _ in range(a.warmup + a.steps + 6):
            next(loader)


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    about = harness.machine()
    tokenizer = harness.world_tokenizer(a.world)
    stage = replace(STAGES[a.stage]("tiny"), checkpoint=Checkpoints(every_steps=0))
    found: dict[str, list[dict[str, float]]] = {"warm cache": [], "no cache": [], "held in memory": []}
    with tempfile.TemporaryDirectory() as cache:
        warm(a, stage, tokenizer, Path(cache))
        for _ in range(a.rounds):
            found["warm cache"].append(run(a, stage, tokenizer, Path(cache)))
            found["no cache"].append(run(a, stage, tokenizer, None))
            found["held in memory"].append(run(a, stage, tokenizer, Path(cache), held=True))
    cases = {name: {k: harness.spread([r[k] for r in runs]) for k in runs[0]} for name, runs in found.items()}
    share = cases["warm cache"]["wait_share"]["median"]
    rows = [
        (name, harness.shown(c["wait_share"], ".2%"), harness.shown(c["step_ms"], ".0f"),
         f"{c['cache_hits']['median']:.0%}",
         harness.judged(share, GOAL, below=True) if name == "warm cache" else "")
        for name, c in cases.items()
    ]  # fmt: skip
    columns = ("", "time waiting (least to most)", "ms a step", "cache hits", f"< {GOAL:.0%}")
    notes = [f"{a.rounds} alternating rounds of {a.steps} steps after {a.warmup}; {a.workers} decode process(es)"]
    return harness.report(a, f"waiting for data, {a.stage} at tiny", about, columns, rows, {"cases": cases}, notes)


if __name__ == "__main__":
    harness.run(main)
