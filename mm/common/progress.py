"""A line that says how far, how fast and how long still."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """72.4 -> '1m12s', 4000 -> '1h06m'."""
    s = int(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Progress:
    """`with Progress(100, "clips") as p: p.update()`. One live line on a terminal, a line every
    ten seconds elsewhere; `total=None` when the end is not known."""

    def __init__(self, total: int | None, label: str, *, quiet: bool = False, stream: TextIO | None = None):
        self.total, self.label, self.quiet = total, label, quiet
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty()
        self.done, self.start, self.last = 0, time.monotonic(), 0.0
        self.note = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._print(final=True)

    def update(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if now - self.last >= (0.2 if self.live else 10.0):
            self.last = now
            self._print()

    def _print(self, final: bool = False) -> None:
        if self.quiet:
            return
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / elapsed
        text = f"{self.label}: {self.done}" + (f"/{self.total}" if self.total else "")
        text += f"  {rate:.1f}/s" if rate >= 1 else f"  {1 / rate if rate else 0:.1f} s each"
        if final:
            text += f"  in {duration(elapsed)}"
        elif self.total and rate:
            text += f"  {duration((self.total - self.done) / rate)} left"
        text += f"  {self.note}" if self.note else ""
        end = "\n" if final or not self.live else ""
        print(("\r\x1b[2K" if self.live else "") + text, end=end, file=self.stream, flush=True)


def track(items: Iterable[T], label: str, *, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """Iterate with a progress line."""
    count = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
    with Progress(count, label, quiet=quiet) as p:
        for item in items:
            yield item
            p.update()
