"""What is in a clip or a still and how it moves: drawn from seeds, checked against what two frames a second show."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_mix.world.words import COLOUR_SHAPE, MATERIALS, SIGN_WORDS, SIGN_WORDS_ZH, SIZES

FPS, SAMPLE_FPS = 12, 2
CLIP_SIZES = ((144, 256), (192, 192), (256, 144))  # (width, height): portrait, square, landscape
STILL_SIZES = (*CLIP_SIZES, (160, 208), (208, 160), (224, 128), (168, 168))
HALF = 0.72  # side of each half after a split, in sides of the whole
BACKGROUNDS = ("gradient", "noise", "stripes", "checks", "blobs", "field")


@dataclass
class Track:
    """Where one part of a thing is: float [T] centre x, y in px; opacity [T] in [0, 1]; half bool [T]."""

    x: np.ndarray
    y: np.ndarray
    opacity: np.ndarray
    half: np.ndarray


@dataclass
class Thing:
    colour: str
    shape: str
    material: str
    size: str
    side: int
    turn: float = 0.0
    tracks: list[Track] = field(default_factory=list)

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass
class Event:
    """Thing `thing` does `motion` from t0 to t1 seconds; `hits` are the times at which it strikes something."""

    thing: int
    motion: str
    t0: float
    t1: float
    hits: list[float] = field(default_factory=list)


@dataclass
class Sign:
    text: str
    box: tuple[int, int, int, int]
    style: int


@dataclass
class Scene:
    """Things are numbered with the movers first; `depth` lists them from back to front, signs lie before all.

    frames == 1 is a still.
    """

    width: int
    height: int
    frames: int
    background: str
    things: list[Thing]
    events: list[Event] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)
    light: dict[str, Any] = field(default_factory=dict)
    depth: list[int] = field(default_factory=list)

    @property
    def short(self) -> int:
        return min(self.width, self.height)

    @property
    def seconds(self) -> float:
        return self.frames / FPS

    @property
    def sampled(self) -> np.ndarray:
        """int64 [n]: the frames that a model sampling two a second sees."""
        n = max(1, int(self.frames / FPS * SAMPLE_FPS)) if self.frames > 1 else 1
        return np.linspace(0, self.frames - 1, n).round().astype(np.int64)


def draw_light(random: np.random.Generator) -> dict[str, Any]:
    return {
        "brightness": round(float(random.uniform(0.8, 1.12)), 3),
        "tint": [round(float(v), 3) for v in random.uniform(0.93, 1.05, 3)],
        "vignette": round(float(random.uniform(0, 0.35)), 3),
    }


def draw_sign_text(random: np.random.Generator) -> str:
    kind = random.choice(4, p=[0.55, 0.15, 0.12, 0.18])
    if kind == 0:
        return str(random.choice(SIGN_WORDS))
    if kind == 3:
        return str(random.choice(SIGN_WORDS_ZH))
    return ("$" if kind == 1 else "¥") + str(random.integers(1, 100))


def sign_size(text: str, short: int) -> tuple[int, int]:
    """(width, height) in px of the plate: letters about a fifth of the short side."""
    letter = 0.2 * short
    width = sum(1.0 if ord(c) > 0x2E80 else 0.66 for c in text) * letter
    return int(min(width + 0.5 * letter, 0.96 * short)), int(1.5 * letter)


def place_sign(text: str, width: int, height: int, random: np.random.Generator) -> tuple[Sign, tuple[int, ...]]:
    """A sign in a corner, and the rectangle (x0, y0, x1, y1) left for things."""
    w, h = sign_size(text, min(width, height))
    top, left = bool(random.integers(2)), bool(random.integers(2))
    gap = 3
    y = gap if top else height - h - gap
    if width > height:  # landscape: the sign takes a column, so that things keep the height
        x = gap if left else width - w - gap
        free = (x + w, 0, width, height) if left else (0, 0, x, height)
    else:
        x = int(random.integers(gap, max(gap + 1, width - w - gap)))
        free = (0, y + h, width, height) if top else (0, 0, width, y)
    return Sign(text, (x, y, x + w, y + h), int(random.integers(5))), free


def draw_thing(
    pair: tuple[str, str], short: int, random: np.random.Generator, *, size: str | None = None,
    material: str | None = None, scale: float = 1.0,
) -> Thing:  # fmt: skip
    size = size or str(random.choice(SIZES))
    low, high = (0.25, 0.30) if size == "small" else (0.38, 0.45)
    side = int(short * random.uniform(low, high) * scale)
    material = material or str(random.choice(MATERIALS))
    return Thing(*pair, material, size, side, round(float(random.uniform(-14, 14)), 1))


def other_pair(taken: list[tuple[str, str]], random: np.random.Generator) -> tuple[str, str]:
    """A colour and shape that training shows and that nobody in the scene has."""
    while True:
        pair = COLOUR_SHAPE[int(random.integers(len(COLOUR_SHAPE)))]
        if pair not in taken:
            return pair


def rest(thing: Thing, x: float, y: float, frames: int) -> None:
    one = np.ones(frames, np.float32)
    thing.tracks = [Track(one * x, one * y, one.copy(), np.zeros(frames, bool))]


def boxes_of(thing: Thing, frame: int) -> list[tuple[float, float, float, float]]:
    """Square around each part that is there in `frame` (render.py has the tight ones)."""
    out = []
    for t in thing.tracks:
        if t.opacity[frame] >= 0.5:
            r = thing.side / 2 * (HALF if t.half[frame] else 1)
            out.append((t.x[frame] - r, t.y[frame] - r, t.x[frame] + r, t.y[frame] + r))
    return out


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area common to two boxes, as a share of the smaller one."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def crowding(thing: Thing, others: list[Thing], frames: np.ndarray) -> float:
    """Largest overlap of `thing` with any other at any of `frames`."""
    worst = 0.0
    for f in frames:
        for a in boxes_of(thing, f):
            for other in others:
                for b in boxes_of(other, f):
                    worst = max(worst, overlap(a, b))
    return worst
