"""Pictures and clips told instead of drawn: things named in their boxes, in the published grounding format.

For a decoder that is to look things up in a picture before there is a tower to see one (`stages/keye/told.py`).
Nobody drew these scenes, so all pairs may come, as in `documents`. The text says each thing once, in any order
(what moves: in the order of moving), beginning with any of its words: from there on every word has to be looked up.
"""

from typing import Any

import numpy as np

from data_mix.world import stills, tasks, text
from data_mix.world.documents import ALL
from data_mix.world.motion import clip_scene
from data_mix.world.scene import SAMPLE_FPS, Scene, Thing, boxes_of
from data_mix.world.truth import still_scene
from data_mix.world.words import MOTIONS, say
from mm.common.seeds import rng


def told(seed: int, index: int) -> dict[str, Any]:
    """Sample `index`; every third a clip."""
    random = rng(seed, "told", index)
    lang = tasks.language(random)
    scene = _clip(random) if index % 3 == 2 else _still(random)
    moving = scene.frames > 1
    words = [_said(t, lang, random) for t in scene.things]
    acts = [e.thing for e in scene.events]
    blank = "" if lang == "zh" else " "
    said = [words[e.thing] + blank + say(e.motion, lang) for e in scene.events]
    rest = [words[i] + (blank + text.still(lang)) * moving for i in range(len(words)) if i not in acts]
    rest += [s.text for s in scene.signs]
    said += [rest[i] for i in random.permutation(len(rest))]
    turn = {"type": "list", "q": "", "a": ("、" if lang == "zh" else ", ").join(said)}
    parts = tasks.video_part() if moving else stills.numbered(1, lang)
    sample = stills.conversation(parts, [turn], "told", {"lang": lang})
    name = parts[0][parts[0]["type"]]
    return {**sample, "media": {name: _facts(scene)}, "told": {name: _in_boxes(scene)}}


def _still(random: np.random.Generator) -> Scene:
    pairs = [ALL[i] for i in random.permutation(len(ALL))[: int(random.integers(2, 6))]]
    signs = [stills.draw_sign_text(random)] if random.random() < 0.4 else []
    return still_scene(random, [(p, {}) for p in pairs], signs=signs)


def _clip(random: np.random.Generator) -> Scene:
    hero = (*ALL[int(random.integers(len(ALL)))], MOTIONS[int(random.integers(len(MOTIONS)))])
    return clip_scene(hero, random, second=random.random() < 0.65)


def _said(thing: Thing, lang: str, random: np.random.Generator) -> str:
    """'red wood ball', 'ball red wood' or 'wood ball red'."""
    k = int(random.integers(3))
    words = [say(v, lang) for v in (thing.colour, thing.material, thing.shape)]
    return ("" if lang == "zh" else " ").join(words[k:] + words[:k])


def _facts(scene: Scene) -> dict[str, Any]:
    size = {"width": scene.width, "height": scene.height}
    if scene.frames == 1:
        return {"kind": "image", **size}
    n = len(scene.sampled)
    return {"kind": "video", **size, "frames": n, "fps": float(SAMPLE_FPS), "seconds": n / SAMPLE_FPS, "rotation": 0,
            "audio": False}  # fmt: skip


def _in_boxes(scene: Scene) -> str:
    """Everything by colour, material and shape, and every sign, in each sampled frame."""
    names = [f"{t.colour} {t.material} {t.shape}" for t in scene.things]
    signs = [{"text": s.text, "box": list(s.box)} for s in scene.signs]
    lines = []
    for k, frame in enumerate(scene.sampled):
        boxes = [[_inside(b, scene) for b in boxes_of(t, int(frame))] for t in scene.things]
        seen = [float(bool(parts)) for parts in boxes]
        truth = {"width": scene.width, "height": scene.height, "boxes": [boxes], "seen": [seen], "signs": signs}
        span = tasks.span(k / SAMPLE_FPS, 0.5 / SAMPLE_FPS) if scene.frames > 1 else ""
        lines.append(span + "".join(stills.regions_in(truth, 0, names, "en")))
    return "\n".join(lines)


def _inside(box: tuple[float, ...], scene: Scene) -> list[int]:
    x0, y0, x1, y1 = box
    return [int(max(x0, 0)), int(max(y0, 0)), int(min(x1, scene.width)), int(min(y1, scene.height))]
