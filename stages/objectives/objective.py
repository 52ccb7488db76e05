"""How a step is made: the one interface between the engine and whatever is being trained towards."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from data_mix.pack import Kind
from mm.common import dist
from stages.stage import Budget

Terms = dict[str, tuple[torch.Tensor | float, float]]


class Objective(ABC):
    """Maps the micro-batches of one optimizer step to gradients and loss terms.

    The engine, for each step and each phase: adds up `counts` over all ranks, hands the sums divided by the
    number of ranks back as `denominators`, and lets `accumulate` leave the gradients. Sharding averages
    gradients over ranks, so a loss sum divided by (global count / ranks) ends as sum over everything / global
    count, however the batch was split.

    `kind` says what batches it takes: packs of conversations, image-text pairs, or named regions.
    A phase is a turn with its own optimizer (a generator's, then a discriminator's); most have one.
    """

    phases: tuple[str, ...] = ("main",)
    kind: Kind = "packs"  # what the loader makes for it

    @abstractmethod
    def counts(self, batches: Sequence[Any]) -> dict[str, float]:
        """What each term will be divided by, counted on this rank before any compute; same keys everywhere."""

    @abstractmethod
    def accumulate(
        self, model: Any, batches: Sequence[Any], denominators: dict[str, float], phase: str = "main"
    ) -> Terms:
        """Add gradients into `model`; return term -> (this rank's share of the sum, its count)."""

    @abstractmethod
    def shaped(self, model: Any, budget: Budget, pieces: int = 1) -> Any:
        """A made-up micro-batch that fills the budget, cut into `pieces` equal segments (pictures, pairs).

        One piece is the largest shape there can be: the dry step runs it. More are the usual case, for `mm plan`.
        """

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


def grids(visual_tokens: int, pieces: int = 1, merge: int = 2) -> torch.Tensor:
    """int64 [pieces, 3], in patches: pictures as near square as their equal share of `visual_tokens` merged
    tokens allows; none where there is less than one token for each."""
    share = visual_tokens // pieces
    if share < 1:
        return torch.zeros(0, 3, dtype=torch.int64)
    rows = int(share**0.5)
    return torch.tensor([[1, rows * merge, share // rows * merge]] * pieces)
