"""Muon: the momentum of every matrix, made orthogonal before it is added (Jordan et al. 2024, kellerjordan.github.io,
"Muon: an optimizer for hidden layers in neural networks").

torch has one (torch.optim.Muon), held against this in the tests. It orthogonalises in bfloat16 whatever the machine,
which a CPU without it emulates; every rank does all of it; and sharded gradients make it depend on their number.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from mm.common import dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen by its author to grow small values fastest
STEPS = 5
AT_ONCE = 2**24  # numbers that travel in one message; every matrix of tiny together, each by itself at 8b


def orthogonal(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[m, n] -> fp32 [m, n] with the same singular vectors, and singular values of 0.68 to 1.21 where they were above
    1/500 of the norm (smaller ones grow by less than 500): five Newton-Schulz steps of
    x <- a x + (b A + c A A) x, A = x x', in `dtype`."""
    a, b, c = COEFFICIENTS
    y = x.to(dtype)
    y = y.T if len(x) > x.shape[1] else y
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.T if len(x) > x.shape[1] else y).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonal update, decoupled decay. A step has AdamW's size (0.2 * sqrt(longer side), Liu
    et al. 2025, arXiv 2502.16982), so one learning rate serves both. Each rank orthogonalises some of the matrices.

    Args: groups of matrices, each with lr and weight_decay; `state` is laid out by `optim.build`. dtype: of the
    multiplications; momentum and weights are fp32.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, dtype: torch.dtype):
        super().__init__(groups, {"momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        used = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for some in _rounds(used):
            updates = []
            for p, grad, group in some:
                momentum = self.state[p]["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                updates.append(grad.lerp(momentum, group["momentum"]))
            for (p, _, group), update in zip(some, self._orthogonal(updates), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def _orthogonal(self, updates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each by one rank, then all to all in one message (a sum with zeros: exact)."""
        whole = [u.full_tensor() if isinstance(u, DTensor) else u for u in updates]
        if dist.world_size() == 1:
            return [orthogonal(u, self.dtype) for u in whole]
        flat = torch.zeros(sum(u.numel() for u in whole), device=whole[0].device)
        parts = flat.split([u.numel() for u in whole])
        for u, part, owner in zip(whole, parts, owners(whole, dist.world_size()), strict=True):
            if owner == dist.rank():
                part.copy_(orthogonal(u, self.dtype).flatten())
        dist.sum_tensor(flat)
        return [_as(part.view(u.shape), u) for part, u in zip(parts, updates, strict=True)]


Used = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]  # parameter, gradient, group


def _rounds(used: Sequence[Used]) -> Iterator[list[Used]]:
    """In order, as many together as have AT_ONCE numbers, one at least: what a step needs besides stays small."""
    some: list[Used] = []
    for one in used:
        if some and sum(p.numel() for p, _, _ in [*some, one]) > AT_ONCE:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def owners(matrices: Sequence[torch.Tensor], ranks: int) -> list[int]:
    """Which rank works on each, the largest first, always the one with least to do."""
    work = [min(m.shape) ** 2 * max(m.shape) for m in matrices]
    load, owner = [0] * ranks, [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: -work[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += work[i]
    return owner


def _as(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, cut over the ranks as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=like.placements
    )
