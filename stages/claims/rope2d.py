"""keye.rope2d: position interpolation alone loses on unseen aspect ratios, 2-D RoPE recovers.

Published (Keye-VL report 1, table 2): a SigLIP tower made native-resolution by interpolating its learned positions
loses against the tower at a fixed square (ObjectNet 76.99 -> 67.58); with 2-D RoPE added it recovers (78.70).
Their explanation: interpolated positions alone leave a picture's shape ambiguous (14x14 or 7x28 patches).

Here: the tiny tower learns from random weights to say which way one thing lies from another (left, right, above,
below: whichever offset is larger in px) and what shape each is, from pictures of photo ratios (up to 3:2); then it
is asked on strips of 1:2 to 1:4. The same data, order, heads and initial weights in all three arms: every picture
resized to one square (learned positions), interpolated positions, interpolated positions with 2-D RoPE. Questions
are answered by linear heads over the features of a thing's own patches. Shape can be read off the patches
themselves: it is the control, which tells whether the arms see equally well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_mix.world.words import SHAPES
from mm.common.precision import has_bf16
from mm.common.seeds import rng
from mm.sizes import SIZES
from stages.claims.claim import Cell, Claim, Contrast, Lines, Row, Tick, constant, spread
from stages.claims.scenes import PATCH, PROCESSOR, RELATIONS, Picture, Size, cover, pictures, squared
from stages.engine import optim
from stages.stage import Optim
from vision.init import siglip
from vision.vit import VisionTower, normalise

ARMS = ("fixed square", "interpolation", "interpolation + 2-D RoPE")
SQUARE, PLAIN, ROPE = ARMS
GROUPS: dict[str, tuple[Size, ...]] = {
    "seen": ((6, 6), (5, 7), (7, 5), (6, 8), (8, 6), (6, 9), (9, 6)),  # as photos: up to 3:2
    "1:2": ((5, 10), (10, 5)),
    "1:3": ((4, 12), (12, 4)),
    "1:4": ((4, 16), (16, 4)),
}
UNSEEN = tuple(g for g in GROUPS if g != "seen")
QUESTIONS = ("relation", "shape")


@dataclass(frozen=True)
class Config:
    """steps of `batch` pictures out of `train`; `test` pictures per group; side of the fixed square in patches."""

    steps: int = 300
    batch: int = 32
    train: int = 3200
    test: int = 480
    square: int = 7
    lr: float = 3e-3
    weight_decay: float = 0.05


class Item(NamedTuple):
    """patches uint8 [h * w, 588]; where float [2, h * w]; labels int64 [3]: relation, the two shapes."""

    patches: torch.Tensor
    grid: Size
    where: torch.Tensor
    labels: torch.Tensor


class Reader(nn.Module):
    """The tower, and linear heads over the mean feature of each thing's patches."""

    def __init__(self, *, rope: bool):
        super().__init__()
        config = replace(SIZES["tiny"].vision, rope=rope)
        self.tower = VisionTower(config)
        self.relation = nn.Linear(2 * config.hidden_size, len(RELATIONS))
        self.shape = nn.Linear(config.hidden_size, len(SHAPES))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The same for every arm: they have the same parameters."""
        for name, p in self.named_parameters():
            p.copy_(siglip(name, p.shape, seed))

    def forward(self, items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
        """M items in runs of one grid -> fp32 logits [M, 4] of the relation, [M, 2, 6] of the shapes."""
        pixels = normalise(torch.cat([i.patches for i in items]), torch.float32)
        grids = torch.tensor([(1, *i.grid) for i in items])
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(pixels.device)):
            features = self.tower(pixels, grids)
        parts = features.float().split([len(i.patches) for i in items])
        things = torch.stack([i.where @ f for i, f in zip(items, parts, strict=True)])  # [M, 2, D]
        return self.relation(things.flatten(1)), self.shape(things)


def items_of(pictures: list[Picture], square: int | None) -> list[Item]:
    """Ready for the tower, at their own grid, or all resized to a square of so many patches."""
    out = []
    for p in pictures:
        p = squared(p, square) if square else p
        grid = (p.pixels.shape[0] // PATCH, p.pixels.shape[1] // PATCH)
        where = torch.from_numpy(np.stack([cover(box, grid) for box in p.boxes]))
        patches = torch.from_numpy(PROCESSOR.patchify(p.pixels[None]))
        out.append(Item(patches, grid, where, torch.tensor([p.relation, *p.shapes])))
    return out


def by_grid(items: list[Item], most: int = 64) -> Iterator[list[Item]]:
    for _, run in groupby(sorted(items, key=lambda i: i.grid), key=lambda i: i.grid):
        same = list(run)
        yield from (same[k : k + most] for k in range(0, len(same), most))


def learn(arm: str, items: list[Item], c: Config, seed: int, tick: Tick) -> tuple[Reader, dict[str, float]]:
    """The tower trained on `items`, and its mean losses over the last tenth of the steps."""
    model = Reader(rope=arm == ROPE)
    model.init_weights(seed)
    settings = Optim(name="muon", lr=c.lr, weight_decay=c.weight_decay, warmup_steps=min(20, c.steps // 4),
                     min_lr_ratio=0.02)  # fmt: skip
    dtype = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32
    optimizer = optim.build(model, optim.select(model, {"*": 1.0}), {"*": 1.0}, settings, dtype=dtype)
    scheduler, last = optim.scheduler(optimizer, settings, c.steps), []
    for batch in batches(items, c, seed):
        losses = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        scheduler.step()
        last.append(losses.detach())
        tick()
    mean = torch.stack(last[-max(c.steps // 10, 1) :]).mean(0)
    return model, dict(zip(QUESTIONS, mean.tolist(), strict=True))


def batches(items: list[Item], c: Config, seed: int) -> Iterator[list[Item]]:
    """The order of pictures depends on the seed alone: every arm sees the same."""
    random, left = rng(seed, "rope2d", "order"), np.zeros(0, np.int64)
    for _ in range(c.steps):
        while len(left) < c.batch:
            left = np.concatenate([left, random.permutation(len(items))])
        take, left = left[: c.batch], left[c.batch :]
        yield sorted((items[i] for i in take), key=lambda i: i.grid)


def loss_of(model: Reader, batch: list[Item]) -> torch.Tensor:
    """fp32 [2]: mean cross entropy of relation and shape."""
    relation, shape = model(batch)
    labels = torch.stack([i.labels for i in batch])
    return torch.stack([F.cross_entropy(relation, labels[:, 0]),
                        F.cross_entropy(shape.flatten(0, 1), labels[:, 1:].flatten())])  # fmt: skip


@torch.no_grad()
def accuracy(model: Reader, items: list[Item]) -> dict[str, float]:
    right = torch.zeros(2)
    for batch in by_grid(items):
        relation, shape = model(batch)
        labels = torch.stack([i.labels for i in batch])
        right += torch.stack([(relation.argmax(-1) == labels[:, 0]).float().sum(),
                              (shape.argmax(-1) == labels[:, 1:]).float().mean(1).sum()])  # fmt: skip
    return dict(zip(QUESTIONS, (right / len(items)).tolist(), strict=True))


def one_seed(c: Config, seed: int, folder: Path, tick: Tick) -> Row:
    """{"accuracy": {arm: {group: {question}}}, "loss": {arm: ...}, "squeezed": {group: accuracy}}."""
    train = pictures(seed, "train", c.train, GROUPS["seen"])
    tests = {g: pictures(seed, f"test {g}", c.test, grids) for g, grids in GROUPS.items()}
    row: Row = {"accuracy": {}, "loss": {}, "squeezed": {
        g: float(np.mean([p.squeezed == p.relation for p in ps])) for g, ps in tests.items()}}  # fmt: skip
    for arm in ARMS:
        square = c.square if arm == SQUARE else None
        model, row["loss"][arm] = learn(arm, items_of(train, square), c, seed, tick)
        row["accuracy"][arm] = {g: accuracy(model, items_of(ps, square)) for g, ps in tests.items()}
    return row


def mean_of(row: Row, arm: str, groups: tuple[str, ...], question: str = "relation") -> float:
    return float(np.mean([row["accuracy"][arm][g][question] for g in groups]))


def gain(row: Row, groups: tuple[str, ...], question: str = "relation") -> float:
    """What 2-D RoPE adds to interpolation."""
    return mean_of(row, ROPE, groups, question) - mean_of(row, PLAIN, groups, question)


CONTRASTS = (
    Contrast("RoPE recovers", "relation, unseen ratios: with 2-D RoPE - interpolation alone",
             lambda r: gain(r, UNSEEN), decides=True),
    Contrast("interpolation loses on unseen ratios", "its fall from seen to unseen ratios - RoPE's fall",
             lambda r: gain(r, UNSEEN) - gain(r, ("seen",)), decides=True),
    Contrast("RoPE on seen ratios", "relation, seen ratios: with 2-D RoPE - interpolation alone",
             lambda r: gain(r, ("seen",))),
    Contrast("fixed square - interpolation, unseen", "relation, unseen ratios",
             lambda r: mean_of(r, SQUARE, UNSEEN) - mean_of(r, PLAIN, UNSEEN)),
    Contrast("control: shape, unseen", "shape, unseen ratios: with 2-D RoPE - interpolation alone",
             lambda r: gain(r, UNSEEN, "shape")),
)  # fmt: skip


def table(rows: list[Row]) -> Lines:
    """Columns: relation in each group, relation over the unseen ones, shape seen and unseen."""
    lines: Lines = {
        "chance": constant(1 / len(RELATIONS), len(GROUPS) + 1) + constant(1 / len(SHAPES), 2),
        "shapeless": [*_squeezed(rows), None, None],
    }
    asked = [(g, "relation") for g in _columns()] + [(("seen",), "shape"), (UNSEEN, "shape")]
    for arm in ARMS:
        lines[arm] = [spread([mean_of(r, arm, groups, question) for r in rows]) for groups, question in asked]
    lines["ceiling"] = constant(1.0, len(GROUPS) + 3)
    return lines


def _columns() -> list[tuple[str, ...]]:
    return [*((g,) for g in GROUPS), UNSEEN]


def _squeezed(rows: list[Row]) -> list[Cell]:
    return [spread([float(np.mean([r["squeezed"][g] for g in groups])) for r in rows]) for groups in _columns()]


def notes(rows: list[Row]) -> list[str]:
    losses = ", ".join(f"{arm} {np.mean([r['loss'][arm]['relation'] for r in rows]):.3f}" for arm in ARMS)
    return [
        f"training loss of the relation at the end (chance {np.log(len(RELATIONS)):.2f}): {losses}",
        "shapeless: the answer of one who knows where things are as shares of the sides, but not the frame's shape",
    ]


CLAIM = Claim(
    name="keye.rope2d",
    says="interpolated positions alone lose on unseen aspect ratios; 2-D RoPE recovers",
    source="Keye-VL report 1 (arXiv 2507.01949), table 2",
    cost="5 seeds: about 7 minutes on two idle cores",
    config=Config(), prepare=lambda config, folder, quiet: None, seed=one_seed,
    steps=lambda c: len(ARMS) * c.steps, contrasts=CONTRASTS, unit="accuracy",
    columns=(*GROUPS, "unseen", "shape, seen", "shape, unseen"),
    table=table, notes=notes, plotted=len(GROUPS) + 1, dashed=("chance", "shapeless", "ceiling"),
)  # fmt: skip
