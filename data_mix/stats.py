"""What is in a source: samples, tokens, lengths, families, and how full packs of it would be."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_mix.counts import count_source
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import Kind, PackPlan
from data_mix.shards import Source
from mm.common.errors import UserError
from mm.processor import Processor
from mm.tokenizer import Tokenizer


@dataclass
class Stats:
    """Counts under one processor and tokenizer. `histogram`: samples by length, {upper edge in tokens: n};
    `families`: name -> {samples, tokens, visual}; `packing`: shares of the budgets that packs fill."""

    name: str
    samples: int = 0
    tokens: int = 0
    visual: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    families: dict[str, dict[str, int]] = field(default_factory=dict)
    histogram: dict[int, int] = field(default_factory=dict)
    packing: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.samples} samples, {self.tokens:,} tokens, {self.visual:,} of them visual"]
        lines += [f"  not usable: {n} x {reason}" for reason, n in self.unusable.most_common()]
        lines.append(f"  {'family':<16}{'samples':>9}{'tokens':>12}{'visual':>12}{'mean length':>13}")
        for family, f in sorted(self.families.items(), key=lambda item: -item[1]["tokens"]):
            mean = f["tokens"] / max(f["samples"], 1)
            lines.append(f"  {family:<16}{f['samples']:>9}{f['tokens']:>12,}{f['visual']:>12,}{mean:>13.1f}")
        lines.append("  length (tokens)")
        most = max(self.histogram.values(), default=1)
        for edge, n in self.histogram.items():
            lines.append(f"  {f'<= {edge}':>9}{n:>9}  {'#' * round(40 * n / most)}")
        if self.packing:
            p = self.packing
            lines.append(
                f"  packing: {p['tokens']:.1%} of the token budget, {p['visual']:.1%} of the visual budget, "
                f"{p['samples_per_pack']:.1f} samples a pack; {p['refused']:.0f} samples do not fit"
            )
        return "\n".join(lines)


def stats(
    folder: str | Path, processor: Processor, tokenizer: Tokenizer, *, token_budget: int | None = None,
    visual_budget: int | None = None, quiet: bool = False,
) -> Stats:  # fmt: skip
    """Statistics of a source folder, or of all source folders in a folder.

    With budgets (tokens, and merged visual tokens, of a pack) packing is planned too, sources weighted by their
    samples, without those that tell their pictures where others show them. Raises UserError where there is no source.
    """
    paths = source_folders(folder)
    out = Stats(Path(folder).name)
    lengths: list[np.ndarray] = []
    families: dict[str, Counter[str]] = defaultdict(Counter)
    for path in paths:
        source = Source(path)
        counts = count_source(source, processor, tokenizer, kind=kind_of(source), quiet=quiet)
        out.unusable.update(counts.reasons.values())
        good = counts.tokens >= 0
        lengths.append(counts.tokens[good])
        for i in map(int, np.flatnonzero(good)):
            row: Any = families[str(source.sample(i).get("family") or source.name)]
            row.update(samples=1, tokens=int(counts.tokens[i]), visual=int(counts.visual[i]))
        out.samples += len(source)
        out.visual += int(counts.visual[good].sum())
    table = np.concatenate(lengths)
    out.tokens, out.histogram = int(table.sum()), _histogram(table)
    out.families = {name: dict(c) for name, c in families.items()}
    if token_budget and visual_budget:
        out.packing = _packing(paths, processor, tokenizer, token_budget, visual_budget)
    return out


def kind_of(source: Source) -> Kind:
    """Whether the pictures of its first sample are shown or told."""
    return "told" if len(source) and source.sample(0).get("told") else "packs"


def alike(paths: list[Path]) -> tuple[Kind, list[Path]]:
    """What can share packs: the sources that show their pictures, or, where all tell them, those."""
    kinds = {p: kind_of(source) for p in paths if len(source := Source(p))}
    kind: Kind = "packs" if "packs" in kinds.values() or not kinds else "told"
    return kind, [p for p, k in kinds.items() if k == kind]


def source_folders(folder: str | Path) -> list[Path]:
    """`folder` itself where it is a source, else the sources in it (or in its folder `sources`)."""
    folder = Path(folder)
    if (folder / "source.json").is_file():
        return [folder]
    found = sorted(p.parent for p in [*folder.glob("*/source.json"), *folder.glob("sources/*/source.json")])
    if not found:
        raise UserError(f"{folder} holds no source.json and no .tar, nor do the folders in it; import the data first")
    return found


def _histogram(lengths: np.ndarray) -> dict[int, int]:
    """By powers of two, from the shortest to the longest that occur."""
    if not len(lengths):
        return {}
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(exponents)
    return {2 ** int(e): int(counts[e]) for e in range(int(exponents.min()), len(counts))}


def _packing(
    paths: list[Path], processor: Processor, tokenizer: Tokenizer, token_budget: int, visual_budget: int
) -> dict[str, float]:
    kind, paths = alike(paths)
    specs = [SourceSpec(p, len(Source(p)), "samples") for p in paths]
    plan = PackPlan(Mix(specs), processor, tokenizer, token_budget, visual_budget, kind=kind)
    return {**plan.efficiency(), "refused": float(len(plan.refused))}
