"""Run the seeds of a claim side by side, one thread each, and keep every finished one.

    OUT/config.json    the claim's numbers        OUT/seeds.jsonl   one line per finished seed
    OUT/shared/        what all seeds share       OUT/seed-N/       what a seed is working on; removed when done

One thread each, on whatever number of cores: a seed's row does not depend on how many run beside it.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from mm.common.config import to_dict
from mm.common.errors import UserError
from mm.common.files import read_json, read_jsonl, write_json
from mm.common.precision import settle
from mm.common.progress import Progress
from stages.claims.claim import Asked, Claim, Row, Tick
from stages.engine.log import open_append, write_line
from stages.stage import Stopped, differences

_shared: tuple[Any, Any] = (None, None)  # in a worker: the counter of steps, the wish to stop


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(claim: Claim, seeds: int, folder: Path, *, workers: int | None = None) -> list[Row]:
    """Rows of seeds 0 .. seeds - 1, those in `folder` read, the others run. Ctrl-C keeps what is finished.

    Raises UserError where `folder` holds the claim with other numbers; KeyboardInterrupt once all is down.
    """
    same_config(claim, folder)
    done = finished(folder)
    todo = [s for s in range(seeds) if s not in done]
    if todo:
        claim.prepare(claim.config, folder / "shared", claim.quiet)
        if done and not claim.quiet:
            print(f"{claim.name}: {len(done)} seeds are there already, {len(todo)} to go")
        workers = min(workers or cores(), len(todo))
        with Progress(claim.steps(claim.config) * len(todo), claim.name, quiet=claim.quiet) as progress:
            (_alone if workers == 1 else _side_by_side)(claim, todo, folder, progress, workers)
        done = finished(folder)
    return [done[s] for s in range(seeds)]


def same_config(claim: Claim, folder: Path) -> None:
    config = json.loads(json.dumps({"claim": claim.name, "config": to_dict(claim.config)}))
    path = folder / "config.json"
    if path.exists():
        changed = differences(read_json(path), config)
        if changed:
            raise UserError(f"{folder} holds other numbers ({'; '.join(changed)}); give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def finished(folder: Path) -> dict[int, Row]:
    path = folder / "seeds.jsonl"
    return {r["seed"]: r for r in read_jsonl(path)} if path.exists() else {}


def _alone(claim: Claim, todo: list[int], folder: Path, progress: Progress, _: int) -> None:
    for seed in todo:
        row = one_seed(claim, seed, folder, lambda: progress.update())
        _keep(folder, row)


def _side_by_side(claim: Claim, todo: list[int], folder: Path, progress: Progress, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    steps, stop = context.Value("l", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(steps, stop))
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        waiting: set[Future] = {pool.submit(_work, claim.name, claim.config, s, folder) for s in todo}
        while waiting:
            ended, waiting = wait_for(waiting, timeout=0.5)
            for future in ended:
                _keep(folder, future.result())
            progress.update(steps.value - progress.done)
    except BaseException:
        stop.set()
        if not claim.quiet:
            print(f"{claim.name}: ending the seeds at work; finished ones are kept", flush=True)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _keep(folder: Path, row: Row) -> None:
    with open_append(folder / "seeds.jsonl") as f:
        write_line(f, row)
    shutil.rmtree(folder / f"seed-{row['seed']}", ignore_errors=True)


# --- in a worker ------------------------------------------------------------------------------------------


def _begin(steps: Any, stop: Any) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _shared = (steps, stop)


def _tick() -> None:
    steps, stop = _shared
    if stop.is_set():
        raise Asked
    with steps.get_lock():
        steps.value += 1


def _work(name: str, config: Any, seed: int, folder: Path) -> Row:
    from dataclasses import replace

    from stages.claims import CLAIMS

    return one_seed(replace(CLAIMS[name], config=config, quiet=True), seed, folder, _tick)


def one_seed(claim: Claim, seed: int, folder: Path, tick: Tick) -> Row:
    """The row of one seed, with its time and the precision of this machine."""
    threads, begun = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    try:
        values = claim.seed(claim.config, seed, folder, tick)
    except Stopped as e:
        raise KeyboardInterrupt from e
    finally:
        torch.set_num_threads(threads)
    precision = settle("auto", torch.device("cpu"))
    return {"seed": seed, "seconds": round(time.monotonic() - begun, 1), "precision": precision, **values}
