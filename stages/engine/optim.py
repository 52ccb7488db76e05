"""What trains, at which rate, with which decay; and how the rate changes over the steps."""

import fnmatch
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mm.common.config import nearest
from mm.common.errors import UserError
from stages.engine.muon import Muon
from stages.stage import Optim

Selection = dict[str, str]  # parameter name -> the pattern that rules it, for those that train


def select(model: nn.Module, patterns: dict[str, float]) -> Selection:
    """Freeze what no pattern matches (or one with rate 0), unfreeze the rest; call before sharding.

    A pattern is matched as in fnmatch (`*` crosses dots) against every name of a parameter (tied weights have
    several); the last that matches rules. Raises UserError for one that matches nothing, naming the nearest.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    rules: dict[int, str] = {}
    for pattern in patterns:
        hits = [p for name, p in named if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UserError(f"train: {pattern!r} matches no parameter{_nearest(pattern, model)}")
        rules.update({id(p): pattern for p in hits})
    selection = {}
    for name, p in model.named_parameters():
        pattern = rules.get(id(p), "")
        p.requires_grad_(bool(pattern) and patterns[pattern] != 0)
        if p.requires_grad:
            selection[name] = pattern
    if not selection:
        raise UserError("train: every pattern has rate 0, so nothing would train")
    return selection


def _nearest(pattern: str, model: nn.Module) -> str:
    stem = pattern.split("*")[0].rstrip(".") or pattern.strip("*.")
    modules = [name for name, _ in model.named_modules() if name and not any(c.isdigit() for c in name)]
    return nearest(stem, modules) + " (write it as NAME.*)"


def undecayed(model: nn.Module) -> set[str]:
    """Names without weight decay: vectors (norms, biases, scales) and embeddings."""
    tables = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules() if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }  # fmt: skip
    return {name for name, p in model.named_parameters() if p.ndim <= 1 or name in tables}


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices between the ends of the model: what Muon is made for."""
    return {
        name for name, p in model.named_parameters()
        if p.ndim == 2 and name not in undecayed(model) and not name.startswith("lm_head.")
    }  # fmt: skip


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups marked `muon`, torch's AdamW for the others, behind one face.

    Both work on the very groups and state of this object, so schedules and checkpoints see one optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], config: Optim, dtype: torch.dtype):
        super().__init__(groups, {"lr": config.lr})
        self.parts: list[torch.optim.Optimizer] = []
        mine = [g for g in self.param_groups if g["muon"]]
        rest = [g for g in self.param_groups if not g["muon"]]
        if mine:
            self.parts.append(Muon(mine, config.momentum, dtype))
        if rest:
            betas = (config.betas[0], config.betas[1])
            self.parts.append(torch.optim.AdamW(rest, betas=betas, eps=config.eps, fused=True))
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def build(
    model: nn.Module, selection: Selection, patterns: dict[str, float], config: Optim,
    owns: Callable[[str], bool] = lambda name: True, *, dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer over the selected parameters, one group for each pattern, decay and kind. Muon multiplies in
    `dtype`.

    Its state is laid out at once, so that memory shows in the dry step and a checkpoint always has every key.
    """
    plain = undecayed(model)
    matrices = hidden_matrices(model) if config.name == "muon" else set()
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if name in selection and owns(name):
            key = (selection[name], 0.0 if name in plain else config.weight_decay, name in matrices)
            groups.setdefault(key, []).append(p)
    if not groups:
        raise UserError("train: a phase of the objective has no parameter to train")
    described: list[dict[str, Any]] = [
        {"params": params, "lr": config.lr * patterns[pattern], "weight_decay": decay, "pattern": pattern,
         "muon": muon}
        for (pattern, decay, muon), params in groups.items()
    ]  # fmt: skip
    optimizer: torch.optim.Optimizer
    if config.name == "muon":
        optimizer = MuonAdamW(described, config, dtype)
    else:
        betas = (config.betas[0], config.betas[1])
        optimizer = torch.optim.AdamW(described, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = blank_state(p, group["muon"])
    return optimizer


def blank_state(p: torch.Tensor, muon: bool) -> dict[str, torch.Tensor]:
    if muon:
        return {"momentum_buffer": torch.zeros_like(p)}
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def schedule(config: Optim, steps: int) -> Callable[[int], float]:
    """Factor on the peak rate for step i of `steps` (from 0): a linear warm-up, then cosine, a flat
    stretch with a linear fall at its end ("wsd"), or flat; all but the last end at `min_lr_ratio`."""
    low = config.min_lr_ratio
    fall = max(round(steps * config.decay_share), 1)

    def factor(i: int) -> float:
        if i < config.warmup_steps:
            return (i + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "wsd":
            return 1.0 - (1.0 - low) * min(max(i - (steps - 1 - fall), 0) / fall, 1.0)
        done = (i - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    return factor


def scheduler(optimizer: torch.optim.Optimizer, config: Optim, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, schedule(config, steps))


def gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]


def total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all gradients and, where they are sharded, all ranks; a plain scalar."""
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def table(model: nn.Module, selection: Selection, patterns: dict[str, float], config: Optim) -> Table:
    """What each pattern matched, and what is frozen, as a table to print."""
    kind = {"adamw": "AdamW", "muon": "Muon on matrices, AdamW on the rest"}[config.name]
    t = Table(title=f"what trains ({kind}, {config.schedule}, peak lr {config.lr:g})")
    for column in ("pattern", "tensors", "parameters", "lr", "decay"):
        t.add_column(column, justify="left" if column == "pattern" else "right")
    plain, named = undecayed(model), dict(model.named_parameters())
    for pattern, factor in patterns.items():
        names = [n for n, p in selection.items() if p == pattern]
        for label, decay, part in (
            ("", config.weight_decay, [n for n in names if n not in plain]),
            (" (vectors, embeddings)", 0.0, [n for n in names if n in plain]),
        ):
            if part or (not names and not label):
                lr = f"{config.lr * factor:.3g}" if part else "overruled" if factor else "0"
                t.add_row(pattern + label, str(len(part)), _millions(named[n] for n in part), lr, f"{decay:g}")
    frozen: dict[str, list[str]] = {}
    for name in named:
        if name not in selection:
            frozen.setdefault(name.split(".")[0], []).append(name)
    for top, names in frozen.items():
        t.add_row(f"{top}.*", str(len(names)), _millions(named[n] for n in names), "frozen", "-", style="dim")
    return t


def _millions(params: Iterable[torch.Tensor]) -> str:
    n = sum(p.numel() for p in params)
    return f"{n / 1e6:.2f}M" if n >= 1e5 else f"{n:,}"
