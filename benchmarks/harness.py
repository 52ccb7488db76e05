"""What every benchmark shares: the machine it ran on, medians with their spread, one table, one JSON file."""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the mm command sets it, before torch is loaded

import torch
from rich.console import Console
from rich.table import Table

from data_mix.shards import Source
from mm.common.errors import UserError
from mm.tokenizer import Tokenizer
from stages.keye.run import VOCABULARY, texts_of

Json = dict[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With --threads and --json, which every benchmark takes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=0, help="torch threads (default: as torch finds them)")
    p.add_argument("--json", type=Path, help="also write the figures to this file")
    return p


def begin(a: argparse.Namespace) -> None:
    if a.threads:
        torch.set_num_threads(a.threads)


def machine() -> Json:
    """Where and when the figures were taken; `load` is what else ran (1-minute average of runnable processes)."""
    return {
        "date": datetime.date.today().isoformat(), "cpu": _cpu(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


Moment = tuple[float, float]


def now() -> Moment:
    """Seconds by the clock, and CPU seconds of this process with all its threads. Where others work on the same
    cores, the second kind is what can be compared."""
    return time.perf_counter(), time.process_time()


def spread(values: Sequence[float]) -> Json:
    """Median, least and most of one figure over the rounds."""
    return {
        "median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values),
    }  # fmt: skip


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Json:
    """Ours over theirs, round by round: what a load that changes between rounds touches least."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(s: Json, form: str = ".2f") -> str:
    """'1.23 (1.10 to 1.31)'."""
    return f"{s['median']:{form}} ({s['min']:{form}} to {s['max']:{form}})"


def judged(value: float, goal: float, *, below: bool = False) -> str:
    return "met" if (value < goal if below else value >= goal) else "not met"


def report(a: argparse.Namespace, title: str, about: Json, columns: Sequence[str], rows: Sequence[Sequence[Any]],
           figures: Json, notes: Sequence[str] = ()) -> Json:  # fmt: skip
    """Print the table; return, and with --json write, everything."""
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for note in notes:
        console.print(note, style="dim")
    about = {**about, "load_after": round(os.getloadavg()[0], 1)}
    console.print(", ".join(f"{k} {v}" for k, v in about.items()), style="dim")
    whole = {"benchmark": title, "machine": about, "notes": list(notes), **figures}
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def world_tokenizer(world: Path) -> Tokenizer:
    """The tokenizer that the tiny recipe trains: on all that is said in the world's sources."""
    return Tokenizer.train(texts_of(sorted(_sources(world).iterdir())), VOCABULARY)


def _sources(world: Path) -> Path:
    folder = world / "sources"
    if not folder.is_dir():
        raise UserError(f"--world {world}: no sources in it; make one with: mm data make-world {world}")
    return folder


def source(world: Path, name: str) -> Source:
    return Source(_sources(world) / name)


def run(main: Callable[[], Json]) -> None:
    """A script's end: a user's mistake is a sentence, not a traceback."""
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
