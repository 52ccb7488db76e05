"""Pictures and clips told instead of drawn: what stands for their pixels names things in their boxes, in the
published grounding format.

For a decoder that is to learn to read a picture before there is a tower to see one (`stages/keye/told.py`). What
training never shows is never told either.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_mix.world import kc, stills, tasks, text
from data_mix.world.motion import clip_scene
from data_mix.world.stills import Sample
from data_mix.world.truth import Outline, brief, truth_of
from data_mix.world.words import COLOUR_SHAPE, MATERIALS, say
from mm.common.seeds import rng

# Samples of each kind: those of stage 2, without places, which no word tells.
SHARES = {
    "caption": 0.18, "ocr": 0.16, "counting": 0.18, "vqa": 0.11, "interleaved": 0.06, "video_caption": 0.18,
    "video_qa": 0.13,
}  # fmt: skip
# Rows of each KC task: what compares pictures takes longest.
SHOP = {"CPV": 0.08, "Video_Topic": 0.2, "Video_Order": 0.24, "PornComment": 0.16, "High_like": 0.12, "SPU": 0.2}
ABSENT = 0.6  # of the things in a list, for how many a near miss is listed too
SHOWN = 4  # frames of a clip beside a list: their words would crowd out the list's


def told(seed: int, index: int) -> Sample:
    """A scene (every third a clip) and a list of all in it, in any order (what moves: in the order of moving), each
    thing's words in any order: whatever word comes first, all that follow have to be looked up. Among them are pairs
    that are not there, marked so in place of a third word."""
    random = rng(seed, "told", index)
    lang, moving = tasks.language(random), index % 3 == 2
    truth = _clip(random) if moving else _still(random)
    frames = np.linspace(0, len(truth["times"]) - 1, SHOWN if moving else 1).round().astype(int).tolist()
    blank = "" if lang == "zh" else " "
    names = [_mixed([t[k] for k in ("colour", "material", "shape")], lang, random) for t in truth["things"]]
    acts = {e["thing"]: blank + say(e["motion"], lang) for e in truth["events"]}
    rest = [n + (blank + text.still(lang)) * moving for i, n in enumerate(names) if i not in acts]
    rest += [s["text"] for s in truth["signs"]]
    near = {text.absent(truth, t, random): None for t in truth["things"] if random.random() < ABSENT}
    rest += [_mixed(pair, lang, random) + blank + say("none", lang) for pair in near]
    listed = [names[i] + act for i, act in acts.items()] + [rest[i] for i in random.permutation(len(rest))]
    turn = {"type": "list", "q": "", "a": ("、" if lang == "zh" else ", ").join(listed)}
    parts = tasks.video_part(frames) if moving else stills.numbered(1, lang)
    return _sample(stills.conversation(parts, [turn], "told", {"lang": lang}), [in_boxes(truth, frames)], [truth])


def told_ask(seed: int, index: int) -> Sample:
    """A still and question after question about what is in it; none has been answered by what was said before."""
    random = rng(seed, "told ask", index)
    lang = tasks.language(random)
    truth = _still(random)
    turns = [t for t in text.attributes(truth, lang, random) if t["type"] != "size"]  # boxes alone tell of size
    turns += [text.present(truth, lang, random) for _ in range(2)]
    turns += [text.sign(truth, lang, random)] if truth["signs"] else []
    turns = text.unspoiled(text.distinct([turns[i] for i in random.permutation(len(turns))]))
    return _sample(stills.conversation(stills.numbered(1, lang), turns, "vqa", {"lang": lang}),
                   [in_boxes(truth, [0])], [truth])  # fmt: skip


def told_compare(seed: int, index: int) -> Sample:
    """Two pictures of one thing each, and everything that compares them."""
    random = rng(seed, "told compare", index)
    lang = tasks.language(random)
    first = (stills.any_pair(random), str(random.choice(MATERIALS)))
    shots = [kc.item(picture, random, *thing) for thing in (first, _near(random, *first))]
    one, two = (truth["things"][0] for _, truth in shots)
    q = "两张图是同款商品吗？" if lang == "zh" else "Are the two pictures of the same product?"
    same = "yes" if all(one[k] == two[k] for k in ("colour", "shape", "material")) else "no"
    turns = [*kc.compare([one, two], lang), {"type": "product", "q": q, "a": say(same, lang)}]
    turns = [turns[i] for i in random.permutation(len(turns))]
    parts = [{"type": "image", "image": f"{i}.jpg"} for i in range(len(shots))]
    return _sample(stills.conversation(parts, turns, "compare", {"lang": lang}), [said for said, _ in shots],
                   [truth for _, truth in shots])  # fmt: skip


def _near(random: np.random.Generator, pair: stills.Pair, material: str) -> tuple[stills.Pair, str]:
    """The same thing, one with one attribute changed, or one where each is the same half the time."""
    kind = random.integers(4)
    if kind == 0:
        return pair, material
    if kind == 1:
        return stills.change_one(random, pair, material, str(random.choice(["colour", "shape", "material"])))
    colour, shape, stuff = random.random(3) < 0.5
    pool = [p for p in COLOUR_SHAPE if (p[0] == pair[0]) == colour and (p[1] == pair[1]) == shape]
    others = [material] if stuff else [m for m in MATERIALS if m != material]
    return stills.any_pair(random, pairs=pool), str(random.choice(others))


def told_task(seed: int, index: int) -> Sample:
    """A conversation of stage 2 about told pictures, but for the shop's."""
    random = rng(seed, "told task", index)
    family, lang = str(random.choice(list(SHARES), p=list(SHARES.values()))), tasks.language(random)
    if family in ("video_caption", "video_qa"):
        truth = _clip(random)
        said = in_boxes(truth, list(range(len(truth["times"]))))
        make: Callable = tasks.video_caption if family == "video_caption" else tasks.video_qa
        return _sample(make(truth, random), [said], [truth])
    truths, pictures, turns = stills.FAMILIES[family](picture, random, lang)
    turns = [t for t in turns if t["type"] != "ocr_box"]
    return _sample(
        stills.conversation(stills.numbered(len(truths), lang), turns, family, {"lang": lang}), pictures, truths
    )


def told_shop(seed: int, index: int) -> Sample:
    """A row of the shop's tasks about told pictures, and what is asked after it."""
    random = rng(seed, "told shop", index)
    lang = "zh" if random.random() < 0.5 else "en"
    task = str(random.choice(list(SHOP), p=list(SHOP.values())))
    row = kc.MAKERS[task](picture, random, lang, COLOUR_SHAPE, int(random.integers(12)))
    turns = [{"type": task, "q": row["question"], "a": row["reply"]}, *kc.follow_ups(row, lang, random)]
    parts = [{"type": "image", "image": f"{i}.jpg"} for i in range(len(row["images"]))]
    return _sample(stills.conversation(parts, turns, "shop", {"lang": lang}), row["images"], row["meta"]["truths"])


def picture(random: np.random.Generator, things: list, **kw: Any) -> tuple[str, dict]:
    """A `stills.Shot`: (what is told of a still, truth)."""
    truth = truth_of(Outline(stills.scene_of(random, things, **kw)), [])
    return in_boxes(truth, [0]), truth


def _still(random: np.random.Generator) -> dict:
    pairs = stills.distinct_pairs(random, int(random.integers(2, 6)))
    return picture(random, pairs, signs=[stills.draw_sign_text(random)] if random.random() < 0.4 else [])[1]


def _clip(random: np.random.Generator) -> dict:
    hero = tasks.TRAIN_HEROES[int(random.integers(len(tasks.TRAIN_HEROES)))]
    return brief(truth_of(Outline(clip_scene(hero, random, second=random.random() < 0.65)), []))


def _mixed(words: Sequence[str], lang: str, random: np.random.Generator) -> str:
    """'red wood ball', 'ball red wood' or in any other order."""
    return ("" if lang == "zh" else " ").join(say(words[k], lang) for k in random.permutation(len(words)))


def in_boxes(truth: dict[str, Any], frames: list[int]) -> str:
    """Everything by colour, material and shape, and every letter; in these sampled frames of a clip also what each
    thing does, as `keye.words` teaches a tower to tell it."""
    if truth["seconds"]:
        return tasks.named_at(truth, frames)
    return "".join(stills.regions_in(truth, 0, [stills.unsized(t, "en") for t in truth["things"]]))


def _sample(sample: Sample, said: list[str], truths: list[dict]) -> Sample:
    if truths[0]["seconds"]:
        return {**sample, "media": {"mp4": tasks.clip_facts(truths[0])}, "told": {"mp4": said[0]}}
    return {**sample, "media": stills.media_facts(truths), "told": {f"{i}.jpg": s for i, s in enumerate(said)}}
