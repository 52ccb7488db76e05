"""The truth of a scene as plain JSON, and drawn media with it."""

from typing import Any

import numpy as np

from data_mix.world import encode, motion, scene, sound
from data_mix.world.render import Stage
from data_mix.world.scene import FPS, SAMPLE_FPS, Scene, crowding, draw_light, draw_thing, place_sign, rest
from mm.common.seeds import rng


class Outline:
    """What `render.Stage` tells of a scene without painting it: a square around each part, and nothing hidden."""

    def __init__(self, scene: Scene):
        self.scene = scene

    def boxes(self, i: int, frame: int) -> list[list[int]]:
        w, h = self.scene.width, self.scene.height
        found = scene.boxes_of(self.scene.things[i], frame)
        return [[int(max(x0, 0)), int(max(y0, 0)), int(min(x1, w)), int(min(y1, h))] for x0, y0, x1, y1 in found]

    def seen(self, frame: int) -> list[float]:
        return [float(bool(self.boxes(i, frame))) for i in range(len(self.scene.things))]


def truth_of(stage: Stage | Outline, sounds: list[dict]) -> dict[str, Any]:
    """Things, events (seconds), signs, and per sampled frame the tight boxes [thing][part][x1, y1, x2, y2] in px
    of the clip and the visible share of each thing; sounds: onset, kind, thing, pan, gain."""
    s = stage.scene
    n = range(len(s.things))
    events = [
        {"thing": e.thing, "motion": e.motion, "t0": round(e.t0, 3), "t1": round(e.t1, 3),
         "hits": [round(h, 3) for h in e.hits]} for e in s.events
    ]  # fmt: skip
    return {
        "width": s.width, "height": s.height, "frames": s.frames, "fps": FPS,
        "seconds": round(s.seconds, 3) if s.frames > 1 else 0, "background": s.background, "light": s.light,
        "things": [{k: getattr(t, k) for k in ("colour", "shape", "material", "size")} for t in s.things],
        "events": events, "signs": [{"text": g.text, "box": list(g.box)} for g in s.signs],
        "sampled": [int(i) for i in s.sampled], "times": [round(float(i) / FPS, 3) for i in s.sampled],
        "boxes": [[stage.boxes(i, int(f)) for i in n] for f in s.sampled],
        "seen": [stage.seen(int(f)) for f in s.sampled], "sounds": sounds,
    }  # fmt: skip


def make_clip(
    seed: int, name: str, hero: tuple[str, str, str], *, second: bool
) -> tuple[list[np.ndarray], bytes, dict]:
    """(frames before encoding uint8 [h, w, 3], mp4 bytes, truth) of clip `name`."""
    s = motion.clip_scene(hero, rng(seed, "motion", name), second=second)
    stage = Stage(s, rng(seed, "look", name))
    frames = [stage.frame(i) for i in range(s.frames)]
    wave, sounds = sound.soundtrack(s, rng(seed, "sound", name))
    return frames, encode.mp4(frames, FPS, wave), truth_of(stage, sounds)


def make_brief(
    seed: int, name: str, hero: tuple[str, str, str], *, second: bool
) -> tuple[list[np.ndarray], bytes, dict]:
    """As `make_clip`, but only the sampled frames are drawn, and no sound: less work for what a model that samples
    two frames a second sees anyway. The truth's times are those of this file."""
    s = motion.clip_scene(hero, rng(seed, "motion", name), second=second)
    stage = Stage(s, rng(seed, "look", name))
    frames, truth = [stage.frame(int(i)) for i in s.sampled], brief(truth_of(stage, []))
    return frames, encode.mp4(frames, SAMPLE_FPS, None), truth


def brief(truth: dict[str, Any]) -> dict[str, Any]:
    """The truth of a file that holds the sampled frames alone."""
    n = len(truth["sampled"])
    times = [i / SAMPLE_FPS for i in range(n)]
    events = []
    for event in truth["events"]:
        now = {k: round(float(np.interp(event[k], truth["times"], times)), 3) for k in ("t0", "t1")}
        events.append(event | {**now, "hits": []})
    return truth | {"frames": n, "fps": SAMPLE_FPS, "seconds": n / SAMPLE_FPS, "sampled": list(range(n)),
                    "times": times, "events": events}  # fmt: skip


def still_scene(
    random: np.random.Generator, things: list[tuple[tuple[str, str], dict]], *, signs: list[str] | None = None,
    size: tuple[int, int] | None = None, scale: float = 1.0, limit: float = 0.25,
) -> Scene:  # fmt: skip
    """Things = [((colour, shape), {optional size, material, x: 0..1})] laid out so that none hides much.

    Things that find no room (never the first) are left out; smaller ones are tried first.
    """
    width, height = size or scene.STILL_SIZES[int(random.integers(len(scene.STILL_SIZES)))]
    s = Scene(width, height, 1, str(random.choice(scene.BACKGROUNDS)), [], light=draw_light(random))
    free: tuple[int, ...] = (0, 0, width, height)
    for text in signs or []:
        plate, rest_of = place_sign(text, width, height, random)
        if not s.signs:
            s.signs, free = [plate], rest_of
    for pair, fixed in things:
        fixed = dict(fixed)
        where = fixed.pop("x", None)
        for attempt in range(40):
            thing = draw_thing(pair, s.short, random, scale=scale * (1 - 0.015 * attempt), **fixed)
            r = thing.side / 2 + 2
            x0, y0, x1, y1 = free[0] + r, free[1] + r, free[2] - r, free[3] - r
            if x1 <= x0 or y1 <= y0:
                continue
            x = x0 + where * (x1 - x0) if where is not None else random.uniform(x0, x1)
            rest(thing, x, random.uniform(y0, y1), 1)
            if crowding(thing, s.things, np.array([0])) <= limit:
                s.things.append(thing)
                break
    s.depth = [int(i) for i in random.permutation(len(s.things))]
    return s


def make_still(s: Scene, random: np.random.Generator) -> tuple[np.ndarray, bytes, dict]:
    """(picture uint8 [h, w, 3], jpg bytes, truth)."""
    stage = Stage(s, random)
    picture = stage.frame(0)
    return picture, encode.jpeg(picture), truth_of(stage, [])
