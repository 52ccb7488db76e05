"""From a scene to frames: a textured, lit background made once, things laid over it frame by frame."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_mix.world.paint import sprite
from data_mix.world.scene import HALF, Scene, Sign, Thing

FONT = Path(__file__).parent / "fonts" / "world.otf"
_PLATES = (
    ((20, 20, 24), (250, 250, 250)), ((248, 248, 244), (16, 16, 20)), ((250, 208, 40), (20, 16, 10)),
    ((176, 20, 26), (255, 248, 240)), ((18, 40, 104), (255, 236, 90)),
)  # fmt: skip


def _soft(random: np.random.Generator, cells: int, width: int, height: int) -> np.ndarray:
    long = max(width, height)
    shape = (max(2, round(cells * height / long)), max(2, round(cells * width / long)))
    small = Image.fromarray(random.random(shape, dtype=np.float32))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)


def _hsv(h: float, s: float, v: float) -> np.ndarray:
    k = (np.array([5.0, 3.0, 1.0]) + h * 6) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def _mask(kind: str, width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """float [h, w] in about [0, 1]: how the two background colours mix."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    turn = random.uniform(0, np.pi)
    along = x * np.cos(turn) + y * np.sin(turn)
    if kind == "gradient":
        return (along - along.min()) / np.ptp(along)
    if kind == "noise":
        return 0.6 * _soft(random, 40, width, height) + 0.4 * _soft(random, 9, width, height)
    if kind == "stripes":
        return np.clip(np.sin(along * (2 * np.pi / random.uniform(14, 40))) * 3, -1, 1) * 0.4 + 0.5
    if kind == "checks":
        cell = random.uniform(12, 34)
        return ((x // cell + y // cell) % 2) * 0.8 + 0.1
    if kind == "blobs":
        return np.clip((_soft(random, 6, width, height) - 0.5) * 4 + 0.5, 0, 1)
    horizon = random.uniform(0.35, 0.65) * height + 6 * _soft(random, 8, width, height)[0]  # field: sky over ground
    ground = np.clip((y - horizon[None]) / 3, 0, 1)
    return ground * (0.75 + 0.25 * _soft(random, 48, width, height)) + (1 - ground) * 0.3 * y / height


def background(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """uint8 [h, w, 3]: two quiet colours in a pattern, a little grain, then the light."""
    hue = random.random()
    a = _hsv(hue, random.uniform(0.08, 0.42), random.uniform(0.2, 0.5))
    b = _hsv((hue + random.uniform(-0.2, 0.2)) % 1, random.uniform(0.08, 0.42), random.uniform(0.42, 0.72))
    if random.random() < 0.5:
        a, b = b, a
    mask = _mask(scene.background, scene.width, scene.height, random)
    mask += 0.06 * _soft(random, 64, scene.width, scene.height)
    gain = np.asarray(scene.light["tint"]) * scene.light["brightness"] * 255
    across = np.linspace(-1, 1, scene.width, dtype=np.float32) ** 2
    down = np.linspace(-1, 1, scene.height, dtype=np.float32) ** 2
    shade = 1 - scene.light["vignette"] * 0.5 * (across[None] + down[:, None])
    picture = np.empty((scene.height, scene.width, 3), np.uint8)
    for c in range(3):
        picture[..., c] = np.clip((a[c] + (b[c] - a[c]) * mask) * shade * gain[c], 0, 255)
    return picture


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT), size)


@functools.cache
def _size(words: str, width: int, short: int) -> int:
    """Of a sign's font, so that its words fit on a plate so wide."""
    size = int(0.25 * short)
    while size > 8 and _font(size).getlength(words) > width - 8:
        size -= 1
    return size


def letters(words: str, box: Sequence[int], short: int) -> list[tuple[str, list[int]]]:
    """Each letter of a sign with this plate, blanks left out, and its box (x1, y1, x2, y2) in px, as `_plate` writes
    it."""
    font = _font(_size(words, box[2] - box[0], short))
    left, middle = (box[0] + box[2] - font.getlength(words)) / 2, (box[1] + box[3]) / 2
    ends = [font.getlength(words[: i + 1]) for i in range(len(words))]
    starts = [end - font.getlength(letter) for end, letter in zip(ends, words, strict=True)]  # letters are kerned
    at = [left + x for x in (*starts, ends[-1])]
    _, top, _, bottom = font.getbbox(words, anchor="lm")
    return [
        (letter, [round(at[i]), round(middle + top), round(at[i + 1]), round(middle + bottom)])
        for i, letter in enumerate(words) if letter.strip()
    ]


def _plate(sign: Sign, short: int) -> Image.Image:
    x0, y0, x1, y1 = sign.box
    ground, ink = _PLATES[sign.style]
    w, h = x1 - x0, y1 - y0
    image = Image.new("RGB", (w, h), ground)
    draw = ImageDraw.Draw(image)
    draw.rectangle((1, 1, w - 2, h - 2), outline=ink)
    size = _size(sign.text, w, short)
    draw.text((w / 2, h / 2), sign.text, font=_font(size), fill=ink, anchor="mm")
    return image


class Stage:
    """The sprites of a scene over its background: `frame(i)` paints one, `truth(i)` tells what is seen in it."""

    def __init__(self, scene: Scene, random: np.random.Generator):
        self.scene = scene
        self.base = background(scene, random)
        light = np.asarray(scene.light["tint"]) * min(1.0, scene.light["brightness"] + 0.05)
        self.sprites = {i: self._sprites(t, light, random) for i, t in enumerate(scene.things)}
        self.plates = [(s.box, np.asarray(_plate(s, scene.short))) for s in scene.signs]
        still = [i for i in scene.depth if self._stands(scene.things[i])]
        lowest = 0  # things that never move and lie behind every mover are painted once
        while lowest < len(scene.depth) and scene.depth[lowest] in still:
            self._lay(self.base, scene.depth[lowest], 0)
            lowest += 1
        self.live = scene.depth[lowest:]

    @staticmethod
    def _stands(thing: Thing) -> bool:
        return len(thing.tracks) == 1 and not np.ptp(thing.tracks[0].x) and not np.ptp(thing.tracks[0].y) and bool(
            thing.tracks[0].opacity.min() >= 1)  # fmt: skip

    @staticmethod
    def _sprites(thing: Thing, light: np.ndarray, random: np.random.Generator) -> list[tuple]:
        out = []
        sides = [thing.side] + ([int(thing.side * HALF)] if len(thing.tracks) > 1 else [])
        for side in sides:
            colour, opacity = sprite(
                thing.shape, thing.material, thing.colour, side=side, turn=thing.turn, light=light, random=random
            )
            solid = opacity[..., 0] > 96
            rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
            tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            out.append((colour, opacity, tight))
        return out

    def _parts(self, i: int, frame: int):
        """(sprite, left, top, opacity) of each part of thing i that is there."""
        for track in self.scene.things[i].tracks:
            if track.opacity[frame] > 0.02:
                picture = self.sprites[i][int(track.half[frame])]
                n = picture[0].shape[0]
                x = min(max(round(float(track.x[frame]) - n / 2), 0), self.scene.width - n)
                y = min(max(round(float(track.y[frame]) - n / 2), 0), self.scene.height - n)
                yield picture, x, y, float(track.opacity[frame])

    def _lay(self, canvas: np.ndarray, i: int, frame: int) -> None:
        for (colour, opacity, _), x, y, fade in self._parts(i, frame):
            n = colour.shape[0]
            if fade < 1:
                k = np.uint16(fade * 256)
                colour, opacity = colour * k >> 8, opacity * k >> 8
            under = canvas[y : y + n, x : x + n]
            under[:] = np.minimum((under * (256 - opacity) >> 8) + colour, 255)

    def frame(self, i: int) -> np.ndarray:
        """uint8 [h, w, 3]."""
        canvas = self.base.copy()
        for thing in self.live:
            self._lay(canvas, thing, i)
        for (x0, y0, x1, y1), plate in self.plates:
            canvas[y0:y1, x0:x1] = plate
        return canvas

    def boxes(self, i: int, frame: int) -> list[list[int]]:
        """Tight [x1, y1, x2, y2] in px of each part of thing i that is there, hidden or not."""
        out = []
        for (_, _, tight), x, y, fade in self._parts(i, frame):
            if fade >= 0.5:
                out.append([int(v) for v in (x + tight[0], y + tight[1], x + tight[2], y + tight[3])])
        return out

    def seen(self, frame: int) -> list[float]:
        """Share of each thing that nothing hides in `frame`; 0 where it is not there."""
        clear = np.ones((self.scene.height, self.scene.width), np.float32)
        for (x0, y0, x1, y1), _ in self.plates:
            clear[y0:y1, x0:x1] = 0
        share = [0.0] * len(self.scene.things)
        for i in reversed(self.scene.depth):
            total = visible = 0.0
            for (_, opacity, _), x, y, fade in self._parts(i, frame):
                if fade < 0.5:
                    continue
                n = opacity.shape[0]
                solid = opacity[..., 0] > 96
                total += solid.sum()
                visible += clear[y : y + n, x : x + n][solid].sum()
            for (_, opacity, _), x, y, fade in self._parts(i, frame):
                if fade >= 0.5:
                    n = opacity.shape[0]
                    clear[y : y + n, x : x + n][opacity[..., 0] > 96] = 0
            share[i] = round(float(visible / total), 2) if total else 0.0
        return share
