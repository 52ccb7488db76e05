"""The loop. Read `train` from top to bottom; everything else here is what it says it is."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mm.common import attention, dist
from mm.common.config import to_dict
from mm.common.errors import UserError
from mm.common.files import read_json, write_json
from mm.common.precision import settle
from mm.common.progress import duration
from mm.parallelize import average_gradients, gathered, parallelize, shell
from stages import objectives
from stages.engine import optim
from stages.engine.checkpoint import Checkpoints, as_json
from stages.engine.log import Draws, Log, begin_attempt, memory, peak
from stages.objectives.objective import Objective
from stages.stage import FREE, Stage, Stopped, differences


class StepLoader(Protocol):
    """What the engine needs of a loader: this rank's micro-batches of each step, and a position in JSON that
    says what the next step begins with, whatever the number of ranks and workers."""

    def __iter__(self) -> Iterator[Sequence[Any]]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def train(
    stage: Stage, folder: str | Path, *, model: nn.Module, loader: StepLoader,
    hand_on: Callable[[Path, nn.Module], None], device: torch.device | str = "cpu", quiet: bool = False,
) -> Path:  # fmt: skip
    """Run `stage` in `folder` to its end, from the newest checkpoint there if there is one.

    Args:
        model: fp32, equal on every rank; its parameters are frozen and sharded here.
        loader: yields this rank's micro-batches, one list per optimizer step.
        hand_on: writes the finished model to a folder (rank 0 only), e.g. through `mm.formats.save`.
    Returns: the folder handed on, `folder/model`.
    Raises: Stopped after SIGTERM or Ctrl-C, once a checkpoint is safe; UserError for what a person can mend.
    """
    folder, device, steps = Path(folder), torch.device(device), stage.check().budget.steps
    write_config(stage, folder)
    written, stage = stage, replace(stage, precision=settle(stage.precision, device))
    objective = objectives.make(stage.objective)
    selection, empty = optim.select(model, stage.train), shell(model)
    table = optim.table(model, selection, stage.train, stage.optim)
    model = parallelize(model, device=device, precision=stage.precision, sharding=stage.sharding).train()
    turns = [Turn(phase, model, selection, objective, stage) for phase in objective.phases]
    saver = Checkpoints(folder / "checkpoints", written, model, {t.phase: t.optimizer for t in turns}, warn=_warn)

    position, begun = resume(saver, loader, turns), time.monotonic()
    start, counters = position["step"], position["counters"]
    log = Log(folder, stage, attempt=begin_attempt(folder, stage, step=start), start=start, quiet=quiet)
    draws = Draws(folder, log.attempt)
    log.say(f"{stage.name}: ranks {dist.world_size()}, device {device.type}, precision {stage.precision}, "
            f"attention {attention_of(model, stage)}")  # fmt: skip
    log.say(table if start == 0 else f"going on from step {start} of {steps} (attempt {log.attempt})")
    if start < steps:
        saver.save_frozen()
        dry_step(stage, objective, model, turns, device)

    with Interrupts() as interrupts:
        batches_of = iter(loader)
        for step in range(start + 1, steps + 1):
            clock = time.monotonic()
            here = next_of(batches_of, step)
            waited = time.monotonic() - clock
            names = [name for b in here for name in b.draws]
            draws.step(step, names)
            size = add_up({**objective.measure(here), "flops": objective.flops(model, here)}, device)
            batches = [b.to(device) for b in here]
            losses: dict[str, float] = {}
            norm, fine = 0.0, True
            for turn in turns:
                terms, norm, finite = turn.step(batches, device)
                losses |= terms
                fine &= finite
            counters = judge(stage, counters, fine, step, names, norm)
            seconds = time.monotonic() - clock
            log.step(step, {
                "loss": losses, "grad_norm": norm, "lr": turns[0].lr, "tokens": size["tokens"],
                "samples": size["samples"], "tokens_per_second": size["tokens"] / seconds,
                "mfu": utilisation(size["flops"], seconds, device), "wait_share": waited / seconds,
                "step_seconds": seconds, "memory_gb": memory(device) / 1e9, "skipped": counters["skipped"],
            })  # fmt: skip
            at = {"step": step, "counters": counters, "loader": as_json(loader.state(), "the loader's state")}
            at["schedules"] = {t.phase: t.scheduler.state_dict()["last_epoch"] for t in turns}
            every = stage.checkpoint.every_steps
            if add_up({"asked": interrupts.asked}, device)["asked"] and step < steps:  # any rank's, by all alike
                saver.save(step, at, wait=True)
                stop(log, draws, saver, stage, step)
            elif step == steps or (every and step % every == 0):
                saver.save(step, at, wait=step == steps)
            saver.poll()

    whole = gathered(model, empty)
    if dist.is_main():
        assert whole is not None
        hand_on(folder / "model", whole)
        log.say(f"{stage.name}: {steps} steps in {duration(time.monotonic() - begun)}; handed on {folder / 'model'}")
    dist.barrier()
    log.close()
    draws.close()
    return folder / "model"


def attention_of(model: nn.Module, stage: Stage) -> str:
    """What the model's towers and decoder compute attention with here."""
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    backends = {c.attention for c in configs if hasattr(c, "attention")}
    return ", ".join(sorted({attention.kernel(b, half=stage.precision == "bf16") for b in backends})) or "none"


class Turn:
    """One phase of the objective with its optimizer and schedule."""

    def __init__(self, phase: str, model: nn.Module, selection: optim.Selection, objective: Objective, stage: Stage):
        self.phase, self.model, self.objective, self.stage = phase, model, objective, stage
        self.optimizer = optim.build(
            model, selection, stage.train, stage.optim, lambda name: objective.owns(phase, name),
            dtype=torch.bfloat16 if stage.precision == "bf16" else torch.float32,
        )
        self.scheduler = optim.scheduler(self.optimizer, stage.optim, stage.budget.steps)
        self.lr = 0.0

    def gradients(self, batches: Sequence[Any], device: torch.device) -> tuple[dict, list[torch.Tensor]]:
        """Loss terms of this rank, and the gradients of this phase's own parameters."""
        total = add_up(self.objective.counts(batches), device)
        shares = {k: v / dist.world_size() for k, v in total.items()}  # sharding averages over ranks
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            terms = self.objective.accumulate(self.model, batches, shares, self.phase)
        grads = optim.gradients(self.optimizer)
        average_gradients(grads)
        return terms, grads

    def step(self, batches: Sequence[Any], device: torch.device) -> tuple[dict[str, float], float, bool]:
        """Gradients, finite check, clip, update, schedule. Returns mean losses, gradient norm, whether finite."""
        terms, grads = self.gradients(batches, device)
        total = add_up({f"{k}/{i}": float(v[i]) for k, v in terms.items() for i in (0, 1)}, device)
        norm = optim.total_norm(grads)
        finite = math.isfinite(float(norm))
        if finite:
            own = [p for g in self.optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grads_with_norm_(own, self.stage.optim.grad_clip, norm)
        else:
            self.model.zero_grad(set_to_none=True)  # nothing has a gradient: the update below changes nothing
        self.lr = max(g["lr"] for g in self.optimizer.param_groups)
        self.optimizer.step()
        self.scheduler.step()
        self.model.zero_grad(set_to_none=True)
        return {k: total[f"{k}/0"] / max(total[f"{k}/1"], 1e-9) for k in terms}, float(norm), finite


def add_up(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Every value summed over ranks (fp64 on the way)."""
    keys = list(values)
    dtype = torch.float64 if device.type != "mps" else torch.float32
    summed = dist.sum_tensor(torch.tensor([float(values[k]) for k in keys], dtype=dtype, device=device))
    return dict(zip(keys, summed.tolist(), strict=True))


def next_of(batches: Iterator[Sequence[Any]], step: int) -> Sequence[Any]:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(f"the data ended before step {step}; lower budget.steps or add sources") from None


def utilisation(flops: float, seconds: float, device: torch.device) -> float | None:
    best = peak(device)
    return flops / seconds / (best * dist.world_size()) if best and flops else None


def judge(
    stage: Stage, counters: dict[str, int], fine: bool, step: int, names: list[str], norm: float
) -> dict[str, int]:
    """Count non-finite steps, naming what they were made of. Raises UserError after too many in a row."""
    if fine:
        return {**counters, "in_a_row": 0}
    drawn = [name for part in dist.gather_objects(names) for name in part]
    counters = {"skipped": counters["skipped"] + 1, "in_a_row": counters["in_a_row"] + 1}
    what = f"step {step}: gradient norm {norm}; the step was skipped. It drew {', '.join(drawn) or 'nothing'}"
    if counters["in_a_row"] > stage.optim.bad_steps:
        raise UserError(
            f"{what}. That was {counters['in_a_row']} in a row (optim.bad_steps={stage.optim.bad_steps}): lower "
            "optim.lr, look at these samples with `mm data view`, or go on from an earlier checkpoint"
        )
    if dist.is_main():
        _warn(f"WARNING: {what}")
    return counters


def resume(saver: Checkpoints, loader: StepLoader, turns: list[Turn]) -> dict[str, Any]:
    """Bring model, optimizers, schedules, random state and loader to the newest checkpoint, if there is one."""
    about = saver.resume()
    if about is None:
        return {"step": 0, "counters": {"skipped": 0, "in_a_row": 0}}
    loader.load(about["loader"])
    for turn in turns:
        done = about["schedules"][turn.phase]
        turn.scheduler.load_state_dict({**turn.scheduler.state_dict(), "last_epoch": done, "_step_count": done + 1})
        for group, base, factor in zip(
            turn.optimizer.param_groups, turn.scheduler.base_lrs, turn.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(done)
    return about


def dry_step(stage: Stage, objective: Objective, model: nn.Module, turns: list[Turn], device: torch.device) -> None:
    """Forward and backward at the largest shape the budget allows, before the first step, so that what does
    not fit fails now and not in the night. Leaves weights, optimizer and random state as they were."""
    batch = objective.shaped(model, stage.budget).to(device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for turn in turns:
                turn.gradients([batch], device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not _out_of_memory(e):
            raise
        raise UserError(
            f"{stage.name} does not fit on {device}: one pack of budget.tokens={stage.budget.tokens}, "
            f"budget.visual_tokens={stage.budget.visual_tokens} runs out of memory. Lower them, turn "
            "activation_checkpointing on in the model, or use more ranks; `mm plan` shows what goes where"
        ) from e
    finally:
        model.zero_grad(set_to_none=True)


def _out_of_memory(e: BaseException) -> bool:
    text = str(e).lower()
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def stop(log: Log, draws: Draws, saver: Checkpoints, stage: Stage, step: int) -> None:
    """End an interrupted run, saying how to go on."""
    text = f"{stage.name} stopped at step {step} of {stage.budget.steps}, saved; the same command goes on from there"
    log.say(text)
    log.close()
    draws.close()
    raise Stopped(text)


class Interrupts:
    """SIGTERM and Ctrl-C ask the loop to finish its step, save and stop; a second one quits at once."""

    def __enter__(self) -> "Interrupts":
        self.asked = False
        self.before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in self.before:
            signal.signal(s, self._ask)
        return self

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True
        if dist.is_main():
            _warn("finishing this step, then saving; once more quits at once")

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def write_config(stage: Stage, folder: Path) -> None:
    """config.json beside the checkpoints. Raises UserError where the folder holds a run of another stage."""
    new, changed = to_dict(stage), []
    path = folder / "config.json"
    if dist.is_main() and path.exists() and (folder / "checkpoints").exists():
        old, now = ({k: v for k, v in c.items() if k not in FREE} for c in (read_json(path), new))
        changed = differences(json.loads(json.dumps(old)), json.loads(json.dumps(now)))
    changed = dist.broadcast_object(changed)
    if changed:
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(changed)}); give another --out")
    if dist.is_main():
        write_json(path, new)


def _warn(text: str) -> None:
    print(text, flush=True)
