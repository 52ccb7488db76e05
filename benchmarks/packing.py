"""How full packs are, by tokens: our planner against random padded batches and against filling in order.

On the mix of keye.s2_multitask over a world, at a stage's budgets, and on made-up length mixes with heavy tails.
All from metadata: nothing is decoded.

    python benchmarks/packing.py --world WORLD
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import harness
import numpy as np

from data_mix.mix import Mix, SourceSpec
from data_mix.pack import DRAWS, PACKS, PackPlan, best_fit
from mm.common.seeds import rng
from mm.sizes import PROCESSORS
from stages.keye.s2_multitask import BUDGETS, MIX

GOAL = 0.97
# Lengths in tokens, cut at the budget.
TAILS = {
    "lognormal, median 150, sigma 1": lambda r, n: r.lognormal(np.log(150), 1.0, n),
    "lognormal, median 400, sigma 1.5": lambda r, n: r.lognormal(np.log(400), 1.5, n),
    "Pareto, least 60, exponent 1.1": lambda r, n: 60 * (1 + r.pareto(1.1, n)),
}
Sizes = list[tuple[int, int]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--world", type=Path, required=True, help="a world folder (mm data make-world)")
    p.add_argument("--tokens", default="2048,8192", help="token budgets; visual tokens get three quarters of each")
    p.add_argument("--packs", type=int, default=400, help="packs per figure")
    p.add_argument("--seeds", type=int, default=3)
    return p.parse_args(argv)


def in_order(sizes: Sizes, budget: tuple[int, int]) -> int:
    """Bins when each sample goes into the open bin or, where that is full, into a new one."""
    bins, left = 1, np.array(budget)
    for size in sizes:
        if (left < size).any():
            bins, left = bins + 1, np.array(budget)
        left = left - size
    return bins


def padded(sizes: Sizes, budget: tuple[int, int], random: np.random.Generator) -> float:
    """Real tokens in random batches padded to their longest, with as many samples as fill a budget on average."""
    lengths = np.array([s[0] for s in sizes])
    size = max(int(budget[0] / lengths.mean()), 1)
    batches = random.permutation(lengths)[: len(lengths) // size * size].reshape(-1, size)
    return float(batches.sum() / (batches.max(1) * size).sum())


def figures_of(sizes: Sizes, budget: tuple[int, int], ours: float, seed: int) -> dict[str, float]:
    tokens = sum(s[0] for s in sizes)
    return {
        "ours": ours, "in_order": tokens / (in_order(sizes, budget) * budget[0]),
        "padded": padded(sizes, budget, rng(seed, "padded")),
    }  # fmt: skip


def of_world(a: argparse.Namespace, tokens: int, seed: int) -> dict[str, float]:
    budget = (tokens, tokens * BUDGETS["tiny"].visual_tokens // BUDGETS["tiny"].tokens)
    mix = Mix([SourceSpec(str(harness.source(a.world, n).folder), w) for n, w in MIX["tiny"].items()], seed)
    plan = PackPlan(mix, PROCESSORS["tiny"], a.tokenizer, *budget, seed)
    start = time.perf_counter()
    ours = plan.efficiency(a.packs)
    seconds = time.perf_counter() - start
    sizes = [plan.size(mix.draw(i)) for i in range(2000)]
    return {**figures_of(sizes, budget, ours["tokens"], seed), "visual": ours["visual"],
            "ms_per_pack": 1e3 * seconds / a.packs}  # fmt: skip


def of_lengths(a: argparse.Namespace, name: str, tokens: int, seed: int) -> dict[str, float]:
    """The same windows that a PackPlan would cut: draws for about PACKS packs."""
    random = rng(seed, "lengths")
    mean = np.clip(TAILS[name](random, 20_000), 8, tokens).mean()
    window = int(np.clip(round(PACKS * tokens / mean), DRAWS, 16 * DRAWS))
    filled, packs, seconds, sizes = 0, 0, 0.0, []
    while packs < a.packs:
        part = [(int(n), 0) for n in np.clip(TAILS[name](random, window), 8, tokens)]
        start = time.perf_counter()
        packs += len(best_fit(part, (tokens, 1), random))
        seconds += time.perf_counter() - start
        filled += sum(s[0] for s in part)
        sizes += part
    made = figures_of(sizes, (tokens, 1), filled / (packs * tokens), seed)
    return {**made, "ms_per_pack": 1e3 * seconds / packs}


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    about = harness.machine()
    a.tokenizer = harness.world_tokenizer(a.world)
    cases, rows = {}, []
    for tokens in map(int, a.tokens.split(",")):
        for name in ("world, mix of keye.s2_multitask", *TAILS):
            one = partial(of_lengths, a, name) if name in TAILS else partial(of_world, a)
            runs = [one(tokens, seed) for seed in range(a.seeds)]
            case = {key: harness.spread([r[key] for r in runs]) for key in runs[0]}
            cases[f"{name}, {tokens}"] = case
            rows.append((name, tokens, harness.shown(case["ours"], ".1%"), f"{case['in_order']['median']:.1%}",
                         f"{case['padded']['median']:.1%}", f"{case['ms_per_pack']['median']:.1f}",
                         harness.judged(case["ours"]["median"], GOAL)))  # fmt: skip
    columns = ("lengths", "budget", "ours (least to most)", "in order", "padded", "ms a pack", f"{GOAL:.0%}")
    notes = [f"{a.packs} packs per figure, {a.seeds} seeds; visual budget: three quarters of the tokens"]
    return harness.report(a, "packing efficiency by tokens", about, columns, rows, {"cases": cases}, notes)


if __name__ == "__main__":
    harness.run(main)
