"""Pictures of two things in which the answer lies in the geometry, at any grid of patches.

Only the frame's shape differs between groups: sizes of things and the slant between them are drawn alike
everywhere, in px, and each of the four answers comes equally often in every group.
"""

from dataclasses import dataclass

import numpy as np

from data_mix.world.render import Stage
from data_mix.world.scene import BACKGROUNDS, Scene, Thing, crowding, draw_light, draw_thing, other_pair, rest
from data_mix.world.words import SHAPES
from mm.common.seeds import rng
from mm.processor import Processor
from vision.resize import resize_frames

RELATIONS = ("left of", "right of", "above", "below")
PROCESSOR = Processor(merge_size=1)  # patches of 14 px, not merged: any grid
PATCH = PROCESSOR.patch_size
SIDES = (18, 28)  # px, of things: two fit one above the other in four rows of patches
SLANT = (1.25, 3.0)  # the larger of the two offsets is so many times the smaller: clear, but not along an axis

Size = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class Picture:
    """pixels uint8 [H, W, 3]; boxes float [2, 4] (x1, y1, x2, y2) px of the first and the second thing;
    shapes: their numbers in SHAPES; relation: the first is RELATIONS[relation] the second, along the axis on
    which their centres lie further apart in px; squeezed: the same with centres as shares of the sides, which
    is all that an interpolated position says."""

    pixels: np.ndarray
    boxes: np.ndarray
    shapes: tuple[int, int]
    relation: int
    squeezed: int


def relation_of(dx: float, dy: float) -> int:
    """Which of RELATIONS the offset (first minus second; y grows downwards) is."""
    if abs(dx) > abs(dy):
        return 0 if dx < 0 else 1
    return 2 if dy < 0 else 3


def draw(random: np.random.Generator, grid: Size, relation: int) -> Picture:
    """One picture of `grid` patches in which the first thing is RELATIONS[relation] the second."""
    height, width = (n * PATCH for n in grid)
    while True:
        s = Scene(width, height, 1, str(random.choice(BACKGROUNDS)), [], light=draw_light(random), depth=[0, 1])
        for _ in range(2):
            thing = draw_thing(other_pair([t.pair for t in s.things], random), 84, random)
            thing.side = int(random.integers(SIDES[0], SIDES[1] + 1))
            s.things.append(thing)
        offset = place(s, random, relation)
        if offset is not None:
            stage = Stage(s, random)
            dx, dy = offset
            return Picture(
                stage.frame(0), np.array([stage.boxes(i, 0)[0] for i in range(2)], np.float32),
                (SHAPES.index(s.things[0].shape), SHAPES.index(s.things[1].shape)),
                relation, relation_of(dx / width, dy / height),
            )  # fmt: skip


def place(s: Scene, random: np.random.Generator, relation: int) -> tuple[float, float] | None:
    """Put both things somewhere so that the relation is clear; their offset in px, or None after 200 tries."""
    for _ in range(200):
        (ax, ay), (bx, by) = (_anywhere(t, s, random) for t in s.things)
        dx, dy = ax - bx, ay - by
        slant = max(abs(dx), abs(dy)) / max(min(abs(dx), abs(dy)), 1e-6)
        if not SLANT[0] <= slant <= SLANT[1] or relation_of(dx, dy) != relation:
            continue
        if crowding(s.things[0], s.things[1:], np.array([0])) <= 0.05:
            return dx, dy
    return None


def _anywhere(thing: Thing, s: Scene, random: np.random.Generator) -> tuple[float, float]:
    half = thing.side / 2
    x, y = random.uniform(half, s.width - half), random.uniform(half, s.height - half)
    rest(thing, x, y, 1)
    return x, y


def pictures(seed: int, name: str, count: int, grids: tuple[Size, ...]) -> list[Picture]:
    """`count` pictures, grids and relations in turn, so that every pair of them comes equally often."""
    out = []
    for i in range(count):
        grid, relation = grids[i % len(grids)], i // len(grids) % len(RELATIONS)
        out.append(draw(rng(seed, "rope2d", name, i), grid, relation))
    return out


def squared(picture: Picture, side: int) -> Picture:
    """The picture resized to side x side patches, whatever its shape was."""
    height, width, _ = picture.pixels.shape
    px = side * PATCH
    factor = np.array([px / width, px / height] * 2, np.float32)
    pixels = resize_frames(picture.pixels[None], px, px)[0]
    return Picture(pixels, picture.boxes * factor, picture.shapes, picture.relation, picture.squeezed)


def cover(box: np.ndarray, grid: Size) -> np.ndarray:
    """float [h * w], sum 1: how a box is spread over the patches."""
    across, down = (
        np.clip(np.minimum(high, (np.arange(n) + 1) * PATCH) - np.maximum(low, np.arange(n) * PATCH), 0, PATCH)
        for n, low, high in ((grid[1], box[0], box[2]), (grid[0], box[1], box[3]))
    )
    area = down[:, None] * across[None]
    return (area / area.sum()).astype(np.float32).ravel()
