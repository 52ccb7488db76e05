"""Steps of batches for one rank, assembled ahead in a background thread.

The whole state is the number of the next pack: ranks take packs by stride, workers only decode. So a run
resumed on other ranks or workers draws every remaining sample exactly once.
"""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_mix.assemble import Assembler, Made, Pending
from data_mix.decode import DecodePool
from data_mix.frame_cache import FrameCache
from data_mix.pack import PackPlan
from mm.batch import Batch, PairBatch
from mm.common.errors import UserError

RECENT = 1000  # samples over which the share of bad ones is judged
NAMED = 5  # bad samples named per reason


@dataclass
class LoaderStats:
    """What this rank was handed so far. `wait_seconds`: time the consumer stood still for data."""

    wait_seconds: float = 0.0
    steps: int = 0
    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # holes by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first few names of each reason
    cache_hits: int = 0
    cache_misses: int = 0

    def summary(self) -> str:
        """'3 x damaged video (train/shard-00000.tar/k17#0, ...)', or 'none'."""
        return "; ".join(f"{n} x {r} ({', '.join(self.examples[r])})" for r, n in self.bad.most_common()) or "none"


class Loader:
    """Iterate: one `list[Batch]` (or `list[PairBatch]`) per optimizer step, without end.

    Args:
        plan: what to draw; its `kind` says whether packs or pairs come.
        rank, ranks: this rank takes packs position + rank, position + rank + ranks, ...
        packs_per_step: packs of one optimizer step over all ranks; must divide by `ranks`.
        position: number of the first pack.
        workers: decode processes of this rank; 0 decodes in the background thread, without a deadline.
        cache_dir: folder of decoded frames (None: decode every time), at most `cache_bytes` large.
        deadline: seconds one picture or clip may take to decode.
        prefetch: steps that are made ahead.
        max_bad: share of the last 1000 samples that may be bad; beyond it the run stops.
        on_bad: told the name and the reason of each bad sample when its step is handed out.
    Raises UserError where packs_per_step does not divide by ranks; while iterating, where too many are bad.
    Close it, or use it as a context manager: then neither thread nor process is left.
    """

    def __init__(
        self, plan: PackPlan, *, packs_per_step: int, rank: int = 0, ranks: int = 1, position: int = 0,
        workers: int = 1, cache_dir: str | Path | None = None, cache_bytes: int = 20 << 30,
        deadline: float = 20.0, prefetch: int = 2, max_bad: float = 0.05,
        on_bad: Callable[[str, str], None] = lambda name, reason: None,
    ):  # fmt: skip
        if packs_per_step < 1 or packs_per_step % ranks:
            above = max(-(-packs_per_step // ranks), 1) * ranks
            raise UserError(f"packs_per_step={packs_per_step} does not divide by {ranks} ranks; use {above}")
        self.plan, self.rank, self.ranks, self.packs_per_step = plan, rank, ranks, packs_per_step
        self.position, self.prefetch, self.max_bad = position, max(prefetch, 1), max_bad
        self.stats, self.on_bad = LoaderStats(), on_bad
        cache = FrameCache(cache_dir, max_bytes=cache_bytes) if cache_dir else None
        self._pool = DecodePool(plan.processor, workers=workers, deadline=deadline, cache=cache)
        self._assembler = Assembler(plan, self._pool)
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- state

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the next pack, whose plan it is, and where its window starts."""
        return {
            "position": self.position, "fingerprint": self.plan.fingerprint,
            "anchor": list(self.plan.anchor(self.position)),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError for the state of another plan."""
        if state["fingerprint"] != self.plan.fingerprint:
            raise UserError(
                f"the checkpoint was trained on data plan {state['fingerprint']}, this is {self.plan.fingerprint}: "
                "the sources, weights, budgets, seed, processor or tokenizer differ; restore them, or start anew"
            )
        self._stop_thread()
        self.position = int(state["position"])
        self.plan.trust(tuple(state["anchor"]))

    # ---- the consumer's side

    def __iter__(self) -> Iterator[list[Batch] | list[PairBatch]]:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise UserError("the loader is closed; make a new one")
        if self._thread is None:
            self._start_thread()
        start = time.perf_counter()
        made = self._take()
        self.stats.wait_seconds += time.perf_counter() - start
        self.position += self.packs_per_step
        self._count(made)
        return [m.batch for m in made]

    def _take(self) -> list[Made]:
        assert self._thread is not None
        while True:
            try:
                item = self._queue.get(timeout=0.5)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise RuntimeError("the loader's thread has died") from None
            if isinstance(item, BaseException):
                self._stop_thread()
                raise item
            return item

    def _count(self, made: list[Made]) -> None:
        self.stats.steps += 1
        self.stats.cache_hits, self.stats.cache_misses = self._pool.hits, self._pool.misses
        for name, reason in (s for m in made for s in m.samples):
            self.stats.samples += 1
            self._recent.append(bool(reason))
            if reason:
                self.on_bad(name, reason)
                self.stats.bad[reason] += 1
                names = self.stats.examples.setdefault(reason, [])
                if len(names) < NAMED:
                    names.append(name)
        if sum(self._recent) > self.max_bad * RECENT:
            raise UserError(
                f"{sum(self._recent)} of the last {len(self._recent)} samples are bad (at most "
                f"{self.max_bad:.0%} of {RECENT} may be): {self.stats.summary()}. Run `mm data lint` on the "
                "sources, or raise data.max_bad"
            )

    # ---- the thread's side

    def _start_thread(self) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=self.prefetch)
        self._stop = threading.Event()
        args = (self.position, self._queue, self._stop)
        self._thread = threading.Thread(target=self._produce, args=args, daemon=True, name="loader")
        self._thread.start()

    def _produce(self, position: int, out: queue.Queue, stop: threading.Event) -> None:
        """Media of the next step are asked for before this step's are waited for, so that no worker idles."""
        ahead: deque[list[list[Pending]]] = deque()
        depth = 2 if self._pool.workers else 1
        try:
            while not stop.is_set():
                while len(ahead) < depth:
                    packs = range(position + self.rank, position + self.packs_per_step, self.ranks)
                    ahead.append([self._assembler.begin(p) for p in packs])
                    position += self.packs_per_step
                _put(out, [self._assembler.finish(p) for p in ahead.popleft()], stop)
        except BaseException as e:
            _put(out, e, stop)

    def _stop_thread(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join(timeout=60)
            self._thread = None

    def close(self) -> None:
        """End thread and processes, whatever they are doing. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._stop.set()
        self._pool.close()
        self._stop_thread()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _put(out: queue.Queue, item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            out.put(item, timeout=0.2)
            return
        except queue.Full:
            continue
