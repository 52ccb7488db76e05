"""The seven motions as tracks, and clips as hero, perhaps a second mover, and bystanders."""

import numpy as np

from data_mix.world.scene import (
    BACKGROUNDS,
    CLIP_SIZES,
    FPS,
    HALF,
    Event,
    Scene,
    Thing,
    Track,
    crowding,
    draw_light,
    draw_sign_text,
    draw_thing,
    other_pair,
    place_sign,
    rest,
)
from data_mix.world.words import SHAPE_MOTION

Rect = tuple[float, float, float, float]
CLEAR = 0.28  # of the short side: the least distance that counts as movement


def _ease(p: np.ndarray) -> np.ndarray:
    return 0.5 * p + 0.5 * p * p * (3 - 2 * p)


def _straight(motion: str, room: Rect, t: np.ndarray, t0: float, t1: float, random) -> tuple:
    x0, y0, x1, y1 = room
    p = np.clip((t - t0) / (t1 - t0), 0, 1)
    u, v = random.uniform(0, 0.12), 1 - random.uniform(0, 0.12)
    if motion.startswith("slides"):
        p = _ease(p)
        a, b = (v, u) if motion == "slides left" else (u, v)
        y = random.uniform(y0, y1)
        return x0 + (x1 - x0) * (a + (b - a) * p), np.full_like(t, y), []
    p, a, b, hits = (_ease(p), v, u, []) if motion == "rises" else (p**1.7, u, v, [t1])
    x = random.uniform(x0, x1)
    return np.full_like(t, x), y0 + (y1 - y0) * (a + (b - a) * p), hits


def _bounce(room: Rect, t: np.ndarray, t0: float, t1: float, random) -> tuple:
    """A drop, then one or two hops, each a parabola; hops of about a second, which two frames a second show."""
    x0, y0, x1, y1 = room
    hops = 1 if t1 - t0 < 2 else 2
    lengths = np.array([0.5, *[1.0, 0.9][:hops]])
    lengths *= (t1 - t0) / lengths.sum()
    starts = t0 + np.concatenate([[0], np.cumsum(lengths)])
    height = np.zeros_like(t)
    for i, (start, length) in enumerate(zip(starts[:-1], lengths, strict=True)):
        q = (t - start) / length
        inside = (q >= 0) & (q < 1)
        top = 1.0 if i < 2 else 0.8
        height[inside] = top * (1 - q[inside] ** 2 if i == 0 else 4 * q[inside] * (1 - q[inside]))
    height[t < t0] = 1
    floor = y1 - random.uniform(0, 0.1) * (y1 - y0)
    reach = (floor - y0) * random.uniform(0.85, 1)
    xa = random.uniform(x0, x1)
    xb = np.clip(xa + random.uniform(-0.15, 0.15) * (x1 - x0), x0, x1)
    x = xa + (xb - xa) * np.clip((t - t0) / (t1 - t0), 0, 1)
    return x, floor - reach * height, [float(s) for s in starts[1:]]


def _split(thing: Thing, room: Rect, t: np.ndarray, t0: float, random) -> list[Track]:
    x0, y0, x1, y1 = room
    r = thing.side / 2
    gap = thing.side * random.uniform(0.5, 0.75)  # each half moves this far
    low, high = x0 - r + r * HALF + gap, x1 + r - r * HALF - gap
    x, y = random.uniform(max(low, x0), max(min(high, x1), max(low, x0) + 1)), random.uniform(y0, y1)
    after = t >= t0
    away = gap * _ease(np.clip((t - t0) / 0.5, 0, 1))
    ones = np.ones_like(t)
    return [
        Track(x - away, y * ones, ones.copy(), after),
        Track(x + away, y * ones, after.astype(np.float32), after.copy()),
    ]


def move(thing: Thing, motion: str, room: Rect, frames: int, t0: float, t1: float, random) -> Event:
    """Give `thing` its tracks (room: where its centre may be) and return the event, its number still 0."""
    t = np.arange(frames, dtype=np.float32) / FPS
    full, whole = np.ones(frames, np.float32), np.zeros(frames, bool)
    if motion == "splits":
        at = (t0 + t1) / 2
        thing.tracks = _split(thing, room, t, at, random)
        return Event(0, motion, at, at + 0.5, [at])
    if motion == "vanishes":
        at = (t0 + t1) / 2
        x, y = random.uniform(room[0], room[2]), random.uniform(room[1], room[3])
        thing.tracks = [Track(full * x, full * y, np.clip(1 - (t - at) / 0.3, 0, 1), whole)]
        return Event(0, motion, at, at + 0.3)
    if motion == "bounces":
        x, y, hits = _bounce(room, t, t0, t1, random)
    else:
        x, y, hits = _straight(motion, room, t, t0, t1, random)
    thing.tracks = [Track(x.astype(np.float32), y.astype(np.float32), full, whole)]
    return Event(0, motion, t0, t1, hits)


def shows(thing: Thing, event: Event, scene: Scene) -> bool:
    """Whether the sampled frames alone tell this motion from the other six."""
    s, clear = scene.sampled, CLEAR * scene.short
    first = thing.tracks[0]
    x, y = first.x[s], first.y[s]
    if event.motion == "vanishes":
        there = first.opacity[s]
        return bool((there > 0.9).sum() >= 2 and (there < 0.1).sum() >= 2)
    if event.motion == "splits":
        b = thing.tracks[1]
        apart = b.x[s] - x
        free = min(thing.tracks[0].x.min(), scene.width - b.x.max()) >= thing.side / 2 * HALF - 0.5
        return bool(free and (b.opacity[s] == 0).sum() >= 2 and (apart > thing.side * HALF * 1.3).sum() >= 2)
    if event.motion == "bounces":
        step = np.diff(y)
        down = np.flatnonzero(step > 0.5 * clear)
        return bool(len(down) and (step[down[0] :] < -0.5 * clear).any())
    line = x if event.motion.startswith("slides") else y
    way = np.abs(line - line[0]) / max(abs(line[-1] - line[0]), 1e-6)
    return bool(abs(line[-1] - line[0]) >= clear and ((way > 0.12) & (way < 0.88)).any())


def change_frame(thing: Thing, scene: Scene) -> int:
    """Number (among the sampled) of the first frame that differs for this thing."""
    s = scene.sampled
    moved = np.zeros(len(s), bool)
    for t in thing.tracks:
        far = np.hypot(t.x[s] - t.x[0], t.y[s] - t.y[0]) > 0.05 * scene.short
        moved |= far | (np.abs(t.opacity[s] - t.opacity[0]) > 0.4)
    return int(np.argmax(moved)) if moved.any() else len(s)


def _room(free: tuple[int, ...], side: int) -> Rect:
    r = side / 2 + 2
    return free[0] + r, free[1] + r, free[2] - r, free[3] - r


def _windows(seconds: float, two: bool, random) -> list[tuple[float, float]]:
    if two:
        cut = random.uniform(1.7, 2.0)
        return [(random.uniform(0.15, 0.35), cut - 0.15), (cut + 0.05, random.uniform(3.5, 3.8))]
    start = random.uniform(0.2, 0.6)
    return [(start, start + random.uniform(1.7, seconds - 0.9))]


def clip_scene(hero: tuple[str, str, str], random: np.random.Generator, *, second: bool, motions=None) -> Scene:
    """A clip whose first mover is `hero` = (colour, shape, motion).

    The layout is drawn again until the sampled frames show every event, in order, and nothing hides much of
    anything else. `motions`: what a second mover may do (all that training shows, by default).
    """
    for attempt in range(400):
        scene = _attempt(hero, random, second=second, motions=motions, sign=attempt < 120)
        if scene is not None:
            return scene
    raise AssertionError(f"no layout found for {hero}")


def _movers(hero, random, scene: Scene, free: tuple[int, ...], *, second: bool, motions) -> bool:
    windows = _windows(scene.seconds, second, random)
    for i, (t0, t1) in enumerate(windows):
        if i == 0:
            pair, motion = hero[:2], hero[2]
        else:
            pair = other_pair([hero[:2]], random)
            allowed = [m for s, m in (motions or SHAPE_MOTION) if s == pair[1]]
            motion = str(random.choice(allowed))
        thing = draw_thing(pair, scene.short, random)
        room = _room(free, thing.side)
        if room[2] - room[0] < 4 or room[3] - room[1] < 4:
            return False
        event = move(thing, motion, room, scene.frames, t0, t1, random)
        event.thing = i
        if not shows(thing, event, scene) or crowding(thing, scene.things, scene.sampled) > 0.25:
            return False
        scene.things.append(thing)
        scene.events.append(event)
    order = [change_frame(t, scene) for t in scene.things]
    return len(order) == 1 or order[0] < order[1]


def _attempt(hero, random, *, second: bool, motions, sign: bool) -> Scene | None:
    width, height = CLIP_SIZES[int(random.integers(3))]
    frames = FPS * (4 if second or random.random() < 0.4 else 3)
    scene = Scene(width, height, frames, str(random.choice(BACKGROUNDS)), [], light=draw_light(random))
    free: tuple[int, ...] = (0, 0, width, height)
    if sign and random.random() < 0.6:
        plate, free = place_sign(draw_sign_text(random), width, height, random)
        scene.signs = [plate]
    if not _movers(hero, random, scene, free, second=second, motions=motions):
        return None
    bystanders = int(random.integers(0 if second else 1, 3))
    for _ in range(bystanders):
        add_bystander(scene, free, random, limit=0.4)
    if len(scene.things) < 2:
        return None
    scene.depth = [int(i) for i in random.permutation(len(scene.things))]
    return scene


def add_bystander(scene: Scene, free: tuple[int, ...], random, *, limit: float) -> bool:
    """One more thing that stands (or sways a little) where it hides little; False where no room is left."""
    thing = draw_thing(
        other_pair([t.pair for t in scene.things], random), scene.short, random,
        size="small" if random.random() < 0.75 else "large",
    )  # fmt: skip
    x0, y0, x1, y1 = _room(free, thing.side)
    if x1 <= x0 or y1 <= y0:
        return False
    for _ in range(12):
        rest(thing, random.uniform(x0, x1), random.uniform(y0, y1), scene.frames)
        if crowding(thing, scene.things, scene.sampled) <= limit:
            if random.random() < 0.25:
                sway = 0.02 * scene.short * np.sin(np.arange(scene.frames) / FPS * random.uniform(1.5, 3))
                thing.tracks[0].x += sway.astype(np.float32)
            scene.things.append(thing)
            return True
    return False
