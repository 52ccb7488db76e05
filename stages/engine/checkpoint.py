"""Checkpoints of a run: torch's distributed format, written behind the training, whole or not there.

    checkpoints/frozen/      weights that do not train, once per run
    checkpoints/step-N/      trained weights, optimizer, RNG (DCP files) and COMPLETE.json
    checkpoints/step-N.tmp/  being written; removed at the next start

COMPLETE.json is written last and holds the plain state (step, loader position, schedules, counters), the
stage's fingerprint, and the size of every file, by which a truncated one is known. Tensors are saved whole in
meaning, so any number of ranks may read what any other number wrote. All ranks must see one file system.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from mm.common import dist
from mm.common.errors import UserError
from mm.common.files import read_json, write_json
from stages.stage import Stage

COMPLETE = "COMPLETE.json"
FAILURES = (Exception, CheckpointException)  # what a rank meets reaches all of them as the latter, no Exception

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group


class Checkpoints:
    """Saves and restores one run. `warn` is told, on rank 0, of everything a person must hear of."""

    def __init__(
        self, folder: Path, stage: Stage, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], *,
        warn: Any = print,
    ):  # fmt: skip
        self.folder, self.stage, self.model, self.optimizers, self.warn = folder, stage, model, optimizers, warn
        self.pending: tuple[Path, dict, Future] | None = None
        # The background thread needs collectives that never mix with those of training, and on the CPU.
        self.group = torch.distributed.new_group(backend="gloo") if dist.on() else None
        if dist.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for half in folder.glob("*.tmp"):
                shutil.rmtree(half, ignore_errors=True)
        dist.barrier()

    # what is saved

    def _trained(self) -> dict[str, Any]:
        """Name -> tensor of trained weights, optimizer state and this rank's random state."""
        frozen = self._frozen()
        state = {f"model.{k}": v for k, v in self.model.state_dict().items() if f"model.{k}" not in frozen}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for phase, optimizer in self.optimizers.items():
            for p, values in optimizer.state.items():
                state |= {f"optim.{phase}.{names[id(p)]}.{k}": v for k, v in values.items()}
        return state

    def _random(self) -> dict[str, torch.Tensor]:
        rank = dist.rank()
        state = {f"rng.cpu.{rank}": torch.get_rng_state()}
        if torch.cuda.is_available():
            state[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
        return state

    def _frozen(self) -> dict[str, Any]:
        named = self.model.named_parameters(remove_duplicate=False)
        names = {name for name, p in named if not p.requires_grad}
        return {f"model.{k}": v for k, v in self.model.state_dict().items() if k in names}

    # saving

    def save(self, step: int, plain: dict[str, Any], *, wait: bool = False) -> None:
        """Begin to save after `step`; `plain` is JSON. With `wait` (or synchronous by config) until it is there.

        A failure to write (a full disk) is told, its half-written folder removed, and the older checkpoints
        stay; with `wait` it is an error.
        """
        self.finish()
        final = self.folder / f"step-{step}"
        if not dist.broadcast_object((final / COMPLETE).exists()):
            temporary = final.with_name(f"{final.name}.tmp")
            about = {
                "step": step, "fingerprint": self.stage.fingerprint(), "ranks": dist.world_size(), **plain,
            }  # fmt: skip
            future = self._write(temporary, {**self._trained(), **self._random()})
            self.pending = (final, about, future)
        if wait or not self.stage.checkpoint.asynchronous:
            self.finish(strict=wait)

    def _write(self, folder: Path, state: dict[str, Any]) -> Future:
        return dcp.async_save(  # type: ignore[return-value]
            state, storage_writer=dcp.FileSystemWriter(folder), process_group=self.group,
            async_stager=BlockingAsyncStager(), no_dist=not dist.on(),
        )  # fmt: skip

    def poll(self) -> None:
        """Give a save that has ended its final name; costs nothing while one is being written."""
        if self.pending is not None and self.pending[2].done():
            self.finish()

    def finish(self, *, strict: bool = False) -> None:
        """Wait for the save in flight. Raises UserError where it failed and `strict`."""
        if self.pending is None:
            return
        final, about, future = self.pending
        self.pending, trouble = None, ""
        try:
            future.result()
            if dist.is_main():
                self._complete(final, about)
        except FAILURES as e:
            shutil.rmtree(final.with_name(f"{final.name}.tmp"), ignore_errors=True)
            trouble = (
                f"checkpoint {final} could not be written ({_reason(e)}); the older ones are untouched: "
                f"{', '.join(p.name for p in self.there()) or 'none yet'}"
            )
        if strict:  # all ranks are here: they stop together
            trouble = dist.broadcast_object(trouble)
        if trouble and strict:
            raise UserError(f"{trouble}. Free some space and give the same command again")
        if trouble and dist.is_main():
            self.warn(f"WARNING: {trouble}. Training goes on")

    def _complete(self, final: Path, about: dict[str, Any]) -> None:
        temporary = final.with_name(f"{final.name}.tmp")
        about["files"] = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        write_json(temporary / COMPLETE, about)
        os.replace(temporary, final)
        for old in self.there()[self.stage.checkpoint.keep :]:
            remove(old)

    def save_frozen(self) -> None:
        """Once per run, before the first step."""
        state, final = self._frozen(), self.folder / "frozen"
        if not state or dist.broadcast_object((final / COMPLETE).exists()):
            return
        temporary = final.with_name("frozen.tmp")
        try:
            self._write(temporary, state).result()
        except FAILURES as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"frozen weights could not be written to {final} ({_reason(e)}). Free some space and give the same "
                "command again"
            ) from e
        if dist.is_main():
            self._complete_frozen(temporary, final)
        dist.barrier()

    def _complete_frozen(self, temporary: Path, final: Path) -> None:
        write_json(temporary / COMPLETE, {"files": {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}})
        os.replace(temporary, final)

    # restoring

    def there(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        found = [p for p in self.folder.glob("step-*") if p.suffix == "" and (p / COMPLETE).exists()]
        return sorted(found, key=lambda p: -int(p.name.split("-")[1]))

    def resume(self) -> dict[str, Any] | None:
        """Load the newest checkpoint that can be read into model and optimizers; its plain state, or None
        where the run has none yet.

        A damaged one is named, set aside as step-N.bad, and the one before it is taken.
        Raises UserError where there are checkpoints but none can be read, the frozen weights are damaged, or
        the stage has changed.
        """
        self._check_frozen()
        names = dist.broadcast_object([p.name for p in self.there()])
        for name in names:
            about = self._try(self.folder / name)
            if about is not None:
                return about
        if names:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read (they are kept as step-N.bad); "
                "remove the run's folder to begin again"
            )
        return None

    def _try(self, path: Path) -> dict[str, Any] | None:
        about, trouble = None, ""
        try:
            about = read_json(path / COMPLETE)
            check_files(path, about["files"])
            if about["fingerprint"] == self.stage.fingerprint():
                self._load(path, about)
        except FAILURES as e:
            trouble = _reason(e)
        troubles = [t for t in dist.gather_objects(trouble) if t]
        if not troubles:
            if about["fingerprint"] != self.stage.fingerprint():  # type: ignore[index]
                raise UserError(
                    f"{path} was made by another version of this stage; undo the change, or give another --out"
                )
            return about
        if dist.is_main():
            self.warn(f"WARNING: checkpoint {path} cannot be read ({troubles[0]}); trying the one before it")
            os.replace(path, path.with_name(f"{path.name}.bad"))
        dist.barrier()
        return None

    def _check_frozen(self) -> None:
        folder = self.folder / "frozen"
        if not dist.broadcast_object((folder / COMPLETE).exists()):
            return
        try:
            check_files(folder, read_json(folder / COMPLETE)["files"])
        except UserError as e:
            raise UserError(
                f"the frozen weights in {folder} are damaged ({e}); remove that folder: they are written again from "
                "what the stage starts from"
            ) from e

    def _load(self, path: Path, about: dict[str, Any]) -> None:
        state, random = self._trained(), self._random()
        if dist.rank() < about["ranks"]:
            state |= {k: v for k, v in random.items() if self._has(path, k)}
        self._read(path, state)
        if self._frozen() and (self.folder / "frozen" / COMPLETE).exists():
            self._read(self.folder / "frozen", self._frozen())
        rank = dist.rank()
        if f"rng.cpu.{rank}" in state:
            torch.set_rng_state(state[f"rng.cpu.{rank}"])
        if f"rng.cuda.{rank}" in state:
            torch.cuda.set_rng_state(state[f"rng.cuda.{rank}"])

    def _has(self, path: Path, key: str) -> bool:
        return key in dcp.FileSystemReader(path).read_metadata().state_dict_metadata

    def _read(self, path: Path, state: dict[str, Any]) -> None:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), process_group=self.group, no_dist=not dist.on())


def check_files(folder: Path, sizes: dict[str, int]) -> None:
    """Raises UserError naming the first file that is missing or not as long as it was."""
    for name, size in sizes.items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path.name} is missing")
        if path.stat().st_size != size:
            raise UserError(f"{path.name} has {path.stat().st_size} bytes instead of {size}")


def remove(path: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves no half of it that looks whole."""
    doomed = path.with_name(f"{path.name}.tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _reason(e: BaseException) -> str:
    """The first line of the innermost cause: DCP wraps what went wrong on each rank."""
    failures = getattr(e, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        e = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    text = str(e).strip().splitlines()
    if text and "unexpected pos" in text[0]:  # torch's zip writer, after a write that the disk cut short
        return "no space left on the disk"
    return f"{type(e).__name__}: {text[0] if text else 'no message'}"


def as_json(value: Any, what: str) -> Any:
    """`value` itself, once it is known that it survives JSON. Raises UserError otherwise."""
    try:
        json.dumps(value)
    except TypeError as e:
        raise UserError(f"{what} must be plain JSON values: {e}") from e
    return value
