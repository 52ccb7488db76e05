"""Things as small pictures: six shapes in four materials, drawn once at high resolution, then tinted,
turned and scaled for each clip."""

import functools
from typing import Any

import numpy as np
from PIL import Image

from data_mix.world.words import RGB
from mm.common.seeds import rng

_SIDE, _SUPER, _VARIANTS = 112, 2, 3  # atlas side in px, supersampling, textures per (shape, material)
_LIGHT = np.array([-0.45, -0.6, 0.66], np.float32)  # from the upper left, towards the viewer


def _grid() -> tuple[Any, Any]:
    n = _SIDE * _SUPER
    axis = (np.arange(n, dtype=np.float32) + 0.5) / n * 2.1 - 1.05
    x, y = np.meshgrid(axis, axis)
    return x, y  # x to the right, y down, the thing within [-1, 1]


def _bevel(distance: np.ndarray, width: float) -> tuple:
    """Normals of a plate whose rim falls off over `width`; distance is > 0 inside."""
    height = np.sqrt(np.clip(1 - (1 - np.clip(distance / width, 0, 1)) ** 2, 0, 1)) * width
    gy, gx = np.gradient(height, 2.1 / (_SIDE * _SUPER))
    return -gx, -gy, np.ones_like(gx)


def _star(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, tuple]:
    """Five raised points: each half point is one flat facet."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    local = np.abs((angle + sector / 2) % sector - sector / 2)  # 0 on a point, sector/2 in a notch
    r = np.hypot(x, y)
    inner, outer = 0.45, 1.0
    px, py = r * np.cos(local), r * np.sin(local)
    ex, ey = inner * np.cos(sector / 2) - outer, inner * np.sin(sector / 2)
    edge = ((outer - px) * -ey - (0 - py) * -ex) / np.hypot(ex, ey) * -1
    height = np.clip(edge, 0, None) * 0.9
    gy, gx = np.gradient(height, 2.1 / (_SIDE * _SUPER))
    return edge > 0, (-gx, -gy, np.ones_like(gx))


def _cube(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, tuple]:
    """Seen from a corner above: three faces in a hexagon."""
    c, s = np.cos(np.pi / 6), 0.5
    inside = (np.abs(x) < c) & (np.abs(y) + np.abs(x) * s / c < 1)
    top = y + np.abs(x) * s / c < 0
    normal = np.zeros((3, *x.shape), np.float32)
    for mask, (nx, ny, nz) in (
        (top, (-0.35, -0.75, 0.55)), (~top & (x < 0), (-0.5, 0.1, 0.6)), (~top & (x >= 0), (0.8, 0.35, 0.35)),
    ):  # fmt: skip
        normal[:, mask] = np.array([nx, ny, nz], np.float32)[:, None]
    return inside, tuple(normal)


def _shape(shape: str) -> tuple[np.ndarray, tuple]:
    x, y = _grid()
    r = np.hypot(x, y)
    if shape == "ball":
        return r < 1, (x, y, np.sqrt(np.clip(1 - r * r, 0.01, 1)))
    if shape == "cube":
        return _cube(x, y)
    if shape == "cone":
        half = np.clip((y + 1) / 1.72, 0, 1) * 0.9
        base = (x / 0.9) ** 2 + ((y - 0.72) / 0.27) ** 2 < 1
        side = (np.abs(x) < half) & (y < 0.72)
        nx = np.clip(x / np.maximum(half, 0.05), -1, 1)
        return side | base, (nx, np.full_like(x, -0.25), np.sqrt(np.clip(1 - nx * nx, 0.02, 1)))
    if shape == "star":
        return _star(x, y)
    if shape == "ring":
        tube = (r - 0.7) / 0.3
        up = np.sqrt(np.clip(1 - tube * tube, 0.01, 1))
        return np.abs(tube) < 1, (tube * x / np.maximum(r, 1e-3), tube * y / np.maximum(r, 1e-3), up)
    ax, ay = np.abs(x), np.abs(y)
    arm = 0.32
    distance = np.maximum(np.minimum(1 - ax, arm - ay), np.minimum(1 - ay, arm - ax))
    return distance > 0, _bevel(distance, 0.22)


def _smooth_noise(random: np.random.Generator, cells: tuple[int, int], n: int) -> np.ndarray:
    small = random.random(cells, dtype=np.float32)
    return np.asarray(Image.fromarray(small).resize((n, n), Image.Resampling.BICUBIC), np.float32)


def _materials(material: str, lit: np.ndarray, shine: np.ndarray, normal: np.ndarray, random) -> tuple:
    """(shade in [0, 1.4], gloss in [0, 1], opacity in [0, 1])."""
    n = lit.shape[0]
    if material == "wood":
        x, y = _grid()
        wave = _smooth_noise(random, (4, 3), n) * 5
        turn = random.uniform(-0.5, 0.5)
        grain = 0.5 + 0.5 * np.sin((x * np.cos(turn) + y * np.sin(turn)) * 16 + wave * 2.2)
        return (0.62 + 0.42 * lit) * (0.66 + 0.38 * grain), shine**8 * 0.08, np.ones_like(lit)
    if material == "metal":
        sky = 0.5 + 0.5 * np.sin(normal[1] * 5.5 + normal[0] * 2.0 + random.uniform(0, 1.5))
        return 0.3 + 0.45 * lit + 0.6 * sky**2, np.clip(shine**14 * 0.9 + (sky > 0.93) * 0.4, 0, 1), np.ones_like(lit)
    if material == "glass":
        rim = 1 - np.clip(normal[2], 0, 1)
        gloss = np.clip(shine**30 * 1.3 + np.clip(rim - 0.55, 0, 1) * 0.5, 0, 1)
        return 0.78 + 0.3 * lit + 0.2 * rim, gloss, np.clip(0.72 + 0.26 * rim + gloss, 0, 1)
    dots = _smooth_noise(random, (40, 40), n) > 0.68  # rubber: matt, speckled
    return (0.48 + 0.55 * lit) * (1 - 0.22 * dots), np.zeros_like(lit), np.ones_like(lit)


@functools.cache
def _atlas(shape: str, material: str, variant: int) -> Image.Image:
    """RGBA: R = shade / 1.6, G = gloss, B = silhouette, A = opacity."""
    inside, normal_parts = _shape(shape)
    normal = np.stack(normal_parts).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=0) + 1e-6
    along = np.tensordot(_LIGHT / np.linalg.norm(_LIGHT), normal, 1)
    lit, shine = np.clip(along, 0, 1), np.clip(2 * along * normal[2] - _LIGHT[2], 0, 1)
    random = rng(0, "atlas", shape, material, variant)
    shade, gloss, opacity = _materials(material, lit, shine, normal, random)
    maps = np.stack([np.clip(shade / 1.6, 0, 1), gloss, np.ones_like(lit), opacity * inside], -1)
    n = _SIDE
    weight = maps[..., 3:]
    cells = np.concatenate([maps[..., :3] * weight, weight], -1).reshape(n, _SUPER, n, _SUPER, 4).mean((1, 3))
    cells[..., :3] /= np.maximum(cells[..., 3:], 1e-4)
    return Image.fromarray(np.clip(cells * 255 + 0.5, 0, 255).astype(np.uint8), "RGBA")


def sprite(
    shape: str, material: str, colour: str, *, side: int, turn: float, light: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One thing, ready to lay over a frame.

    Args:
        side: px of the square it is drawn in; turn: degrees; light: float [3], the factor per channel.
    Returns: (premultiplied colour uint16 [side, side, 3] in 0..255, opacity uint16 [side, side, 1] in 0..255).
    """
    maps = _atlas(shape, material, int(random.integers(_VARIANTS)))
    if turn:
        maps = maps.rotate(turn, Image.Resampling.BILINEAR)
    rgba = np.asarray(
        maps.resize((side, side), Image.Resampling.BOX if side < 60 else Image.Resampling.BICUBIC), np.float32
    )
    base = np.array(RGB[colour], np.float32) * light * random.uniform(0.92, 1.06)
    shade, gloss, opacity = rgba[..., :1] * (1.6 / 255), rgba[..., 1:2] / 255, rgba[..., 3:] / 255
    colour_map = np.clip(base * shade, 0, 255) * (1 - gloss) + 250 * gloss
    return (colour_map * opacity + 0.5).astype(np.uint16), (opacity * 255 + 0.5).astype(np.uint16)
