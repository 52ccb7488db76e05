"""How a step is made: the one interface between the engine and whatever is being trained towards."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from mm.common import dist
from stages.stage import Budget

Terms = dict[str, tuple[torch.Tensor | float, float]]


class Objective(ABC):
    """Maps the micro-batches of one optimizer step to gradients and loss terms.

    The engine, for each step and each phase: adds up `counts` over all ranks, hands the sums divided by the
    number of ranks back as `denominators`, and lets `accumulate` leave the gradients. Sharding averages
    gradients over ranks, so a loss sum divided by (global count / ranks) ends as sum over everything / global
    count, however the batch was split.

    A phase is a turn with its own optimizer (a generator's, then a discriminator's); most have one.
    """

    phases: tuple[str, ...] = ("main",)

    @abstractmethod
    def counts(self, batches: Sequence[Any]) -> dict[str, float]:
        """What each term will be divided by, counted on this rank before any compute; same keys everywhere."""

    @abstractmethod
    def accumulate(
        self, model: Any, batches: Sequence[Any], denominators: dict[str, float], phase: str = "main"
    ) -> Terms:
        """Add gradients into `model`; return term -> (this rank's share of the sum, its count)."""

    @abstractmethod
    def largest(self, model: Any, budget: Budget) -> Any:
        """A made-up micro-batch at the largest shape the budget allows, for the dry step."""

    def owns(self, phase: str, name: str) -> bool:
        """Whether the parameter called `name` belongs to this phase's optimizer."""
        return True

    def measure(self, batches: Sequence[Any]) -> dict[str, float]:
        """What the log tells about a step's size, summed over ranks; "tokens" gives the speed."""
        return {
            "tokens": sum(b.input_ids.numel() for b in batches),
            "samples": sum(len(b.draws) for b in batches),
        }

    def flops(self, model: Any, batches: Sequence[Any]) -> float:
        """Model FLOPs of training on these batches (0 where not known: no utilisation is printed)."""
        return 0.0


def most(batches: Sequence[Any], device: torch.device) -> int:
    """The largest number of micro-batches any rank has. Ranks with fewer run blank ones, so that the
    collectives inside a sharded model are the same on every rank."""
    n = torch.tensor([len(batches)], dtype=torch.int64, device=device)
    if dist.on():
        torch.distributed.all_reduce(n, op=torch.distributed.ReduceOp.MAX)
    return int(n)


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def grids(visual_tokens: int, merge: int = 2) -> torch.Tensor:
    """int64 [1, 3]: one picture as near square as `visual_tokens` merged tokens allow, in patches."""
    rows = max(int(visual_tokens**0.5), 1)
    return torch.tensor([[1, rows * merge, max(visual_tokens // rows, 1) * merge]])
