"""Packs planned from metadata alone: windows of draws are best-fitted into token and visual-token budgets.

Everything here is a pure function of (data, processor, tokenizer, weights, budgets, seed): pack i is the same
list of draws on every rank, at every number of workers, and after every restart.
"""

import hashlib
import json
import threading
from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from data_mix.counts import Counts, count_source
from data_mix.mix import Draw, Mix
from data_mix.regions import Names, named_regions, phrase_ids
from mm.common.errors import BadSample, UserError
from mm.common.seeds import rng
from mm.processor import Processor
from mm.prompt import sample_tokens
from mm.tokenizer import Tokenizer

Kind = Literal["packs", "told", "pairs", "regions"]
CONVERSATIONS = ("packs", "told")
DRAWS = 512  # draws that are packed together, more where packs hold many
COPIES = 4  # of one sample in a window, about
PACKS = 96  # packs that a window should fill at least, so that its ragged end weighs little


class PackPlan:
    """`pack(i)` -> the draws of pack i, any i >= 0.

    Args:
        token_budget: tokens per pack at most (of kind "pairs": text tokens).
        visual_budget: merged visual tokens per pack at most (patches / merge_size ** 2).
        alike: packs of one step. Those beside each other within a step have nearly the same number of visual tokens,
            the costliest, so that no rank waits long for another.
        kind: "packs" of whole conversations; "told", the same with pictures told in words (`mm.told`); "pairs" of one
            picture or clip and its caption, whose text is cut at `max_text` tokens; "regions" of one picture or clip,
            named in its caption (`data_mix.regions`).
    Attributes:
        refused: BadSample per sample that can never be drawn (unreadable, or larger than a budget), by name.
        turns: {(source, sample): messages kept} of the conversations whose last exchanges are left out, whole,
            so that the rest fits.
        names: of kind "regions", what its samples call things.
    Raises UserError where nothing is left to draw or a budget is not positive.
    """

    def __init__(
        self, mix: Mix, processor: Processor, tokenizer: Tokenizer, token_budget: int, visual_budget: int,
        seed: int = 0, *, kind: Kind = "packs", max_text: int = 64, alike: int = 1,
        quiet: bool = True,
    ):  # fmt: skip
        if min(token_budget, visual_budget, alike) < 1 or kind not in get_args(Kind):
            raise UserError(f"token_budget={token_budget}, visual_budget={visual_budget} and alike={alike} must be "
                            f"at least 1, kind={kind!r} one of {', '.join(get_args(Kind))}")  # fmt: skip
        self.mix, self.processor, self.tokenizer, self.seed = mix, processor, tokenizer, seed
        self.token_budget, self.visual_budget = token_budget, visual_budget
        self.kind, self.max_text, self.alike = kind, max_text, alike
        self.refused: list[BadSample] = []
        self.turns: dict[tuple[int, int], int] = {}
        self.counts = [
            count_source(s, processor, tokenizer, kind=kind, max_text=max_text, quiet=quiet)
            for s in mix.sources
        ]
        usable = [self._usable(i, c) for i, c in enumerate(self.counts)]
        self._check_something_left(usable)
        means = [float(c.tokens[u].mean()) for c, u in zip(self.counts, usable, strict=True)]
        mix.bind(usable, means)
        self.names = self._names(usable) if kind == "regions" else Names([])
        self.draws_per_window = self._draws_per_window(usable)
        self._first, self._at = [0], [0]  # pack number that window self._at[k] begins with
        self._window = lru_cache(maxsize=4)(self._make_window)
        self._lock = threading.RLock()  # the loader's thread plans ahead while a state is taken

    def _usable(self, number: int, counts: Counts) -> np.ndarray:
        """Sample numbers that fit the budgets, after shortening; the others are refused by name."""
        source, usable = self.mix.sources[number], counts.tokens >= 0
        over = (counts.tokens > self.token_budget) | (counts.visual > self.visual_budget)
        for i in map(int, np.flatnonzero(~usable | over)):
            reason = counts.reasons[i] if not usable[i] else self._shorten(number, i, counts)
            usable[i] = not reason
            if reason:
                shard = f"{source.name}/{source.shard_of(i)}"
                self.refused.append(BadSample(reason, shard=shard, key=source.row(i)["key"]))
        return np.flatnonzero(usable)

    def _names(self, usable: list[np.ndarray]) -> Names:
        phrases = {region.phrase for source, samples in zip(self.mix.sources, usable, strict=True)
                   for i in map(int, samples) for region in named_regions(source.sample(i))}  # fmt: skip
        return Names(phrase_ids(p, self.tokenizer, self.max_text) for p in phrases)

    def _shorten(self, number: int, i: int, counts: Counts) -> str:
        """Keep the most whole exchanges that fit, never cutting inside one; else the reason why not."""
        sample = self.mix.sources[number].sample(i)
        messages = sample["messages"]
        ends = [k + 1 for k, m in enumerate(messages) if m["role"] == "assistant"]
        for turns in reversed(ends if self.kind in CONVERSATIONS else []):
            size = sample_tokens({**sample, "messages": messages[:turns]}, self.processor, self.tokenizer)
            if size[0] <= self.token_budget and size[1] <= self.visual_budget:
                counts.tokens[i], counts.visual[i] = size
                self.turns[number, i] = turns
                return ""
        if counts.visual[i] > self.visual_budget:
            return f"above the visual-token budget {self.visual_budget}"
        return f"longer than the token budget {self.token_budget}"

    def sample(self, draw: Draw) -> dict[str, Any]:
        """The drawn sample with the messages that are kept."""
        sample = self.mix.sources[draw.source].sample(draw.sample)
        turns = self.turns.get((draw.source, draw.sample))
        return sample if turns is None else {**sample, "messages": sample["messages"][:turns]}

    def _check_something_left(self, usable: list[np.ndarray]) -> None:
        for source, samples in zip(self.mix.sources, usable, strict=True):
            if len(source) and not len(samples):
                why = ", ".join(f"{n} x {r}" for r, n in self.refused_by_reason(source.name).items())
                raise UserError(f"no sample of source {source.name!r} ({source.folder}) can be used: {why}; raise "
                                "the budgets or leave the source out")  # fmt: skip

    def refused_by_reason(self, source: str = "") -> dict[str, int]:
        """How many samples are never drawn and why; of one source, or of all."""
        return dict(Counter(b.reason for b in self.refused if not source or b.shard.startswith(source + "/")))

    def _draws_per_window(self, usable: list[np.ndarray]) -> int:
        """So many that about PACKS packs are filled, judged by the first draws; fewer where a source is so small
        that a window would hold its samples more than COPIES times: of one length, they would share a pack."""
        draws = [self.mix.draw(i) for i in range(DRAWS)]
        sizes = np.array([self.size(d) for d in draws])  # [draws, 2]
        share = (sizes / [self.token_budget, self.visual_budget]).mean(0).max()  # of one pack, per draw
        often = max(n / len(usable[s]) for s, n in Counter(d.source for d in draws).items())  # each, in DRAWS draws
        return int(min(np.clip(round(PACKS / share), DRAWS, 16 * DRAWS), np.ceil(COPIES * DRAWS / often)))

    @property
    def fingerprint(self) -> str:
        """Covers sources, weights, unit, seeds, budgets, processor, tokenizer: all that decides pack(i)."""
        text = json.dumps([
            "plan-3", self.mix.fingerprint, self.seed, self.kind, self.max_text, self.alike, self.token_budget,
            self.visual_budget, self.draws_per_window, self.processor.hash, self.tokenizer.hash,
        ])  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def size(self, draw: Draw) -> tuple[int, int]:
        """(tokens, merged visual tokens) of a drawn sample."""
        counts = self.counts[draw.source]
        return int(counts.tokens[draw.sample]), int(counts.visual[draw.sample])

    def pack(self, i: int) -> list[Draw]:
        first, window = self._locate(i)
        return self._window(window, first)[i - first]

    def anchor(self, i: int) -> tuple[int, int]:
        """(first pack, window) of the window that holds pack i: kept in a state, it makes resuming instant."""
        return self._locate(i)

    def trust(self, anchor: tuple[int, int]) -> None:
        """Take up an `anchor` of the same plan, so that no window before it need be planned."""
        with self._lock:
            at = bisect_right(self._first, anchor[0])
            if self._first[at - 1] != anchor[0]:
                self._first.insert(at, anchor[0])
                self._at.insert(at, anchor[1])

    def _locate(self, i: int) -> tuple[int, int]:
        with self._lock:
            k = bisect_right(self._first, i) - 1
            first, window = self._first[k], self._at[k]
            while i >= first + len(self._window(window, first)):
                first, window = first + len(self._window(window, first)), window + 1
                self.trust((first, window))
            return first, window

    def _make_window(self, window: int, first: int) -> list[list[Draw]]:
        """The packs of a window, which are numbers `first` and on of the plan."""
        start = window * self.draws_per_window
        draws = [self.mix.draw(p) for p in range(start, start + self.draws_per_window)]
        budget = (self.token_budget, self.visual_budget)
        packs = best_fit([self.size(d) for d in draws], budget, rng(self.seed, "fit", window))
        made = [[draws[i] for i in p] for p in packs]
        random = rng(self.seed, "packs", window)
        made = [made[k] for k in random.permutation(len(made))]
        if self.alike == 1:
            return made
        ready = -first % self.alike  # so many end the step that the window before began
        ends, rest = (sorted(part, key=self._visual) for part in (made[:ready], made[ready:]))
        steps = [rest[k : k + self.alike] for k in range(0, len(rest), self.alike)]
        whole = len(rest) // self.alike
        order = [*random.permutation(whole), *range(whole, len(steps))]
        return ends + [pack for k in order for pack in steps[k]]

    def _visual(self, pack: list[Draw]) -> int:
        return sum(self.size(d)[1] for d in pack)

    def efficiency(self, packs: int | None = None) -> dict[str, float]:
        """Share of each budget that the first `packs` packs fill (default: whole windows, 200 packs or more),
        and samples per pack."""
        if packs is None:
            first, window = self.anchor(200)
            packs = first + len(self._window(window, first))
        rows = [self.pack(i) for i in range(packs)]
        tokens, visual = np.sum([np.sum([self.size(d) for d in p], axis=0) for p in rows], axis=0)
        return {
            "tokens": float(tokens) / (packs * self.token_budget),
            "visual": float(visual) / (packs * self.visual_budget),
            "samples_per_pack": sum(map(len, rows)) / packs,
        }


def best_fit(
    sizes: list[tuple[int, int]], budget: tuple[int, int], random: np.random.Generator
) -> list[list[int]]:
    """Best fit in two dimensions: item numbers per bin, no bin over either budget.

    Best fit decreasing fills bins best, but puts samples of one length, and so of one source, together. So only
    large items go first and a share of small ones last, the others in random order; the share grows until the
    bins are as full (to 0.5 %) as those of best fit decreasing. Every size must fit an empty bin.
    """
    items = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    shares, shuffled = (items / budget).max(1), random.permutation(len(items))
    decreasing = _fit(items, budget, np.argsort(-shares, kind="stable"))
    for last in (0.25, 0.5):
        bins = _fit(items, budget, _placing_order(shares, shuffled, last))
        if len(bins) <= 1.005 * len(decreasing):
            return bins
    return decreasing


def _placing_order(shares: np.ndarray, shuffled: np.ndarray, last: float) -> np.ndarray:
    """Items above a quarter of the budget from the largest down, others as shuffled, then the `last` share of
    small ones from the largest down."""
    down = np.argsort(-shares, kind="stable")
    place = np.empty_like(down)
    place[down] = np.arange(len(down))
    large, small = shares >= 0.25, place >= round(len(shares) * (1 - last))
    middle = shuffled[~(large | small)[shuffled]]
    return np.concatenate([down[large[down]], middle, down[(small & ~large)[down]]])


def _fit(items: np.ndarray, budget: tuple[int, int], order: np.ndarray) -> list[list[int]]:
    """Each item, in this order, into the fullest bin that still holds it."""
    left = np.empty_like(items)  # what each open bin can still take
    bins: list[list[int]] = []
    for i in order:
        room = left[: len(bins)] - items[i]
        fits = np.flatnonzero((room >= 0).all(1))
        if len(fits):
            b = int(fits[(room[fits] / budget).sum(1).argmin()])
            bins[b].append(int(i))
            left[b] = room[b]
        else:
            left[len(bins)] = np.asarray(budget) - items[i]
            bins.append([int(i)])
    return bins
