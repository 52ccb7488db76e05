"""What a run tells: a line a person can read, the same as JSONL, TensorBoard, and a tracker when asked."""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from mm.common import dist
from mm.common.config import to_dict
from mm.common.errors import UserError
from mm.common.files import read_jsonl
from mm.common.progress import duration
from stages.stage import Stage

# Dense bf16 FLOP/s as the vendors' data sheets state them, by a piece of the device's name.
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip

# Its memory in GB, by the same piece; the larger one where there are two.
MEMORY = {
    "H200": 141, "H100": 80, "H800": 80, "H20": 96, "B200": 192, "A100": 80, "A800": 80, "L40S": 48, "L4": 24,
    "A10": 24, "4090": 24, "3090": 24,
}  # fmt: skip


def peak(device: torch.device) -> float | None:
    """Peak FLOP/s of this device, or None where it is not known (no utilisation is printed then)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for piece, flops in PEAKS.items() if piece in name), None)


def memory(device: torch.device) -> float:
    """Bytes: the device's peak so far on a GPU, this process's resident size on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


def open_append(path: Path) -> TextIO:
    """Open a line file to append to; a last line cut short by a kill is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as f:
            data = f.read()
            if not data.endswith(b"\n"):
                f.truncate(data.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def write_line(f: TextIO, value: Any) -> None:
    """One JSON line, handed to the system at once: it survives a SIGKILL of this process."""
    f.write(json.dumps(value, ensure_ascii=False) + "\n")
    f.flush()


def begin_attempt(folder: Path, stage: Stage, *, step: int) -> int:
    """Note in attempts.jsonl that the run goes on from after `step`, on how many ranks and in which precision;
    returns this attempt's number."""
    number = 0
    if dist.is_main():
        with open_append(folder / "attempts.jsonl") as f:
            number = len(read_jsonl(folder / "attempts.jsonl"))
            facts = {"ranks": dist.world_size(), "precision": stage.precision, "time": time.time()}
            write_line(f, {"attempt": number, "from_step": step, **facts})
    return int(dist.broadcast_object(number))


def lineage(folder: str | Path, pattern: str = "draws-rank*.jsonl") -> list[dict]:
    """The lines of a run that led to its present weights, by step, then rank.

    Each start of a run is an attempt, noted with the step whose checkpoint it went on from. What an attempt
    did after the step from which any later attempt went on is superseded: those steps were done again. So
    a line of attempt a at step s counts exactly when s <= from_step of every later attempt. The same rule
    holds for log.jsonl (`pattern="log.jsonl"`).
    """
    folder = Path(folder)
    starts = [row["from_step"] for row in read_jsonl(folder / "attempts.jsonl")]
    limits = [min(starts[a + 1 :], default=float("inf")) for a in range(len(starts))]
    rows = [row for path in sorted(folder.glob(pattern)) for row in read_jsonl(path)]
    alive = [row for row in rows if row["step"] <= limits[row["attempt"]]]
    return sorted(alive, key=lambda row: (row["step"], row.get("rank", 0)))


class Draws:
    """Append-only draws-rankK.jsonl: what this rank fed to each step, written before the step counts."""

    def __init__(self, folder: Path, attempt: int):
        self.attempt, self.rank = attempt, dist.rank()
        self.file = open_append(folder / f"draws-rank{self.rank}.jsonl")

    def step(self, step: int, draws: list[str]) -> None:
        write_line(self.file, {"step": step, "attempt": self.attempt, "rank": self.rank, "draws": draws})

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class Log:
    """Rank 0's record of the run; on other ranks every call does nothing."""

    def __init__(self, folder: Path, stage: Stage, *, attempt: int, start: int, quiet: bool = False):
        self.stage, self.attempt, self.on, self.quiet = stage, attempt, dist.is_main(), quiet
        self.steps, self.start, self.begin = stage.budget.steps, start, time.monotonic()
        self.board: Any = None
        self.tracker: Any = None
        if not self.on:
            return
        self.file = open_append(folder / "log.jsonl")
        if stage.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where wanted

            self.board = SummaryWriter(str(folder / "tb"), purge_step=start + 1)
        if stage.log.tracker != "none":
            self.tracker = _tracker(stage, folder)

    def say(self, text: Any) -> None:
        """A line (or a rich table) for the person at the terminal, from rank 0 alone."""
        if self.on and not self.quiet:
            _print(text)

    def step(self, step: int, row: dict[str, Any]) -> None:
        """Record a step. Keys of `row`: "loss" (term -> mean), and plain numbers (see `line`)."""
        if not self.on:
            return
        elapsed = time.monotonic() - self.begin
        left = elapsed / max(step - self.start, 1) * (self.steps - step)
        row = {"step": step, "attempt": self.attempt, "seconds_left": round(left, 1), **row}
        write_line(self.file, row)
        flat = {f"loss/{k}": v for k, v in row["loss"].items()}
        flat |= {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "attempt")}
        if self.board is not None:
            for key, value in flat.items():
                self.board.add_scalar(key, value, step)
        if self.tracker is not None:
            self.tracker.log({**flat, "step": step})
        if step % self.stage.log.every_steps == 0 or step == self.steps:
            self.say(line(row, self.steps))

    def close(self) -> None:
        if not self.on:
            return
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.finish()


def line(row: dict[str, Any], steps: int) -> str:
    """A step as a person reads it."""
    loss = "  ".join(f"{k} {v:.4f}" for k, v in row["loss"].items())
    parts = [
        f"step {row['step']}/{steps} {row['step'] / steps:4.0%}", loss,
        f"grad {row['grad_norm']:.2f}", f"lr {row['lr']:.2e}", f"{_short(row['tokens_per_second'])} tok/s",
    ]  # fmt: skip
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts += [f"wait {row['wait_share']:.0%}", f"mem {row['memory_gb']:.2f} GB"]
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    return " | ".join([*parts, f"{duration(row['seconds_left'])} left"])


def _short(n: float) -> str:
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"


def _print(text: Any) -> None:
    if isinstance(text, str):
        print(text, flush=True)
    else:
        from rich.console import Console

        Console().print(text)


def _tracker(stage: Stage, folder: Path) -> Any:
    """A started W&B or trackio run; both speak init, log, finish."""
    name = stage.log.tracker
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(
            f"log.tracker={name} needs the package {name}: pip install 'mmstack[{name}]', or --set log.tracker=none"
        ) from e
    extra = {"dir": str(folder)} if name == "wandb" else {}
    module.init(project=stage.log.project, name=stage.name, config=to_dict(stage), **extra)
    return module
