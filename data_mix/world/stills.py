"""Conversations about stills: caption, vit_pairs, ocr, grounding, counting, vqa, interleaved; and regions of them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from data_mix.world import text
from data_mix.world.render import letters
from data_mix.world.scene import Scene, draw_sign_text
from data_mix.world.text import Turn, short, unique
from data_mix.world.truth import make_still, still_scene
from data_mix.world.words import COLOUR_SHAPE, COLOURS, MATERIALS, SHAPES, phrase, say
from mm.common.seeds import rng

Pair = tuple[str, str]
Sample = dict[str, Any]
Shot = Callable[..., tuple[Any, dict]]  # (random, things, signs=, size=, scale=, limit=) -> (picture or words, truth)
# Whole patches, which the processor keeps.
CLOSE_SIZES = ((84, 84), (84, 112), (112, 84), (112, 112), (84, 140), (140, 84))
SIGN_SIZES = ((112, 112), (140, 112), (112, 140))
SMALL_SIZES = ((120, 152), (136, 136), (152, 120))  # where several pictures share one conversation


def any_pair(random: np.random.Generator, *, without: list[Pair] = [], pairs=COLOUR_SHAPE) -> Pair:  # noqa: B006
    pool = [p for p in pairs if p not in without]
    return pool[int(random.integers(len(pool)))]


def distinct_pairs(random: np.random.Generator, n: int, first: Pair | None = None) -> list[Pair]:
    out = [first] if first else []
    while len(out) < n:
        out.append(any_pair(random, without=out))
    return out


def scene_of(random: np.random.Generator, things: list, **kw: Any) -> Scene:
    """A still's scene; `things` are pairs or (pair, fixed attributes)."""
    return still_scene(random, [t if isinstance(t[1], dict) else (t, {}) for t in things], **kw)


def picture(random: np.random.Generator, things: list, **kw: Any) -> tuple[bytes, dict]:
    """(jpg, truth) of a still; arguments as of `scene_of`."""
    _, jpg, truth = make_still(scene_of(random, things, **kw), random)
    return jpg, truth


def conversation(parts: list[dict], turns: list[Turn], family: str, meta: dict) -> Sample:
    """First turn: the media, then its question; later turns are text alone. Where nothing is asked, a document:
    the media, then their text, without a frame around them."""
    messages: list[dict] = []
    if not turns[0]["q"]:
        messages = [{"role": "text", "content": [*parts, {"type": "text", "text": turns[0]["a"]}]}]
        return {"messages": messages, "family": family, "meta": {**meta, "types": [turns[0]["type"]]}}
    for i, turn in enumerate(turns):
        content: Any = [*parts, {"type": "text", "text": turn["q"]}] if i == 0 else turn["q"]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn["a"]}]
    return {"messages": messages, "family": family, "meta": {**meta, "types": [t["type"] for t in turns]}}


def media_facts(truths: list[dict]) -> dict[str, dict]:
    return {f"{i}.jpg": {"kind": "image", "width": t["width"], "height": t["height"]} for i, t in enumerate(truths)}


def thousand(box: list[int], truth: dict) -> list[int]:
    """Pixels to Keye's integers in [0, 1000)."""
    w, h = truth["width"], truth["height"]
    return [min(999, int(v * 1000 / side)) for v, side in zip(box, (w, h, w, h), strict=True)]


def _box_text(boxes: list[list[int]]) -> str:
    return "[" + ",".join("[" + ",".join(map(str, b)) + "]" for b in boxes) + "]"


def located(name: str, boxes: list[list[int]]) -> str:
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>{_box_text(boxes)}<|box_end|>"


def box_question(thing: dict, lang: str) -> str:
    p = short(thing, lang)
    return f"框出{p}。" if lang == "zh" else f"Give the box of the {p}."


def grounding_turns(truth: dict, lang: str, random: np.random.Generator) -> list[Turn]:
    out: list[Turn] = []
    alone = unique(truth, "pair")
    for i, t in enumerate(truth["things"]):
        if t not in alone or not truth["boxes"][0][i] or truth["seen"][0][i] < 0.6:
            continue
        box, p = thousand(truth["boxes"][0][i][0], truth), short(t, lang)
        out.append({"type": "box", "q": box_question(t, lang), "a": located(p, [box])})
        x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
        if random.random() < 0.35:
            answer = f"<|object_ref_start|>{p}<|object_ref_end|><|point_start|>[[{x},{y}]]<|point_end|>"
            out.append({"type": "point", "q": f"指出{p}。" if lang == "zh" else f"Point to the {p}.", "a": answer})
        if random.random() < 0.35:
            q = f"{_box_text([box])}里是什么？" if lang == "zh" else f"What is in {_box_text([box])}?"
            out.append({"type": "region", "q": q, "a": p})
    for s in truth["signs"]:
        out.append(sign_box(s, truth, lang))
    return [out[i] for i in random.permutation(len(out))]


def sign_box(s: dict, truth: dict, lang: str) -> Turn:
    q = "框出牌子并读出来。" if lang == "zh" else "Box and read the sign."
    return {"type": "ocr_box", "q": q, "a": ocr_text(s["text"], [thousand(s["box"], truth)])}


def ocr_text(words: str, boxes: list[list[int]]) -> str:
    return f"<|ocr_text_start|>{words}<|ocr_text_end|><|box_start|>{_box_text(boxes)}<|box_end|>"


def _caption(shot: Shot, random, lang: str) -> tuple[list[dict], list[Any], list[Turn]]:
    """A dense caption; one in four as a conversation that begins with the plain one."""
    jpg, truth = shot(random, distinct_pairs(random, int(random.integers(1, 5))), signs=_maybe_sign(random, 0.4))
    if random.random() < 0.75:
        return [truth], [jpg], [{"type": "dense", "q": "", "a": text.dense_caption(truth, lang, random)}]
    request = text.REQUESTS["image", lang][0 if random.random() < 0.5 else int(random.integers(1, 3))]
    first = {"type": "caption", "q": request, "a": text.caption(truth, lang)}
    return [truth], [jpg], [first, *text.still_questions(truth, lang, random, first["a"])[:3]]


def _maybe_sign(random: np.random.Generator, share: float) -> list[str]:
    return [draw_sign_text(random)] if random.random() < share else []


def _vit_pairs(shot: Shot, random, lang: str):
    """Mostly close-ups of one thing, some of a sign, some whole pictures: many a pack, of many aspect ratios."""
    kind = random.random()
    if kind < 0.65:
        size = CLOSE_SIZES[int(random.integers(len(CLOSE_SIZES)))]
        jpg, truth = shot(random, distinct_pairs(random, 1), size=size, scale=random.uniform(1.1, 2.0))
        name = unsized(truth["things"][0], lang)
        said = f"一个{name}。" if lang == "zh" else f"a {name}."
    elif kind < 0.83:
        size = SIGN_SIZES[int(random.integers(len(SIGN_SIZES)))]
        jpg, truth = shot(random, distinct_pairs(random, 1), signs=[draw_sign_text(random)], size=size)
        said = text.caption(truth, lang)
    else:
        things = distinct_pairs(random, int(random.integers(1, 4)))
        jpg, truth = shot(random, things, signs=_maybe_sign(random, 0.35))
        said = text.caption(truth, lang)
    return [truth], [jpg], [{"type": "pair", "q": "", "a": said}]


def unsized(thing: dict, lang: str) -> str:
    """'red wood ring': how large a thing is cannot be told from near."""
    return ("" if lang == "zh" else " ").join(say(thing[k], lang) for k in ("colour", "material", "shape"))


def _ocr(shot: Shot, random, lang: str):
    jpg, truth = shot(random, distinct_pairs(random, int(random.integers(1, 4))), signs=[draw_sign_text(random)])
    a, b = text.SIGN_REQUESTS[lang]
    read = [{"type": "ocr", "q": a if random.random() < 0.5 else b, "a": truth["signs"][0]["text"]}]
    rest = [t for t in text.still_questions(truth, lang, random) if t["type"] != "ocr"]
    if random.random() < 0.5:
        read.append(sign_box(truth["signs"][0], truth, lang))
    return [truth], [jpg], text.distinct(read + rest)[:4]


def _grounding(shot: Shot, random, lang: str):
    jpg, truth = shot(random, distinct_pairs(random, int(random.integers(2, 5))), signs=_maybe_sign(random, 0.3))
    return [truth], [jpg], grounding_turns(truth, lang, random)[:7]


def counting_things(random: np.random.Generator, kind: str, k: int, pair: Pair) -> list[Pair]:
    """k things of kind all | colour | shape | pair (after `pair`) and up to three others, as pairs."""
    colour, shape = pair
    if kind == "all":
        return [pair, *(any_pair(random) for _ in range(k - 1))]
    if kind == "pair":
        out, other = [pair] * k, [p for p in COLOUR_SHAPE if p != pair]
    elif kind == "colour":
        out = [pair, *(any_pair(random, pairs=[p for p in COLOUR_SHAPE if p[0] == colour]) for _ in range(k - 1))]
        other = [p for p in COLOUR_SHAPE if p[0] != colour]
    else:
        out = [pair, *(any_pair(random, pairs=[p for p in COLOUR_SHAPE if p[1] == shape]) for _ in range(k - 1))]
        other = [p for p in COLOUR_SHAPE if p[1] != shape]
    more = int(random.integers(0 if k > 4 else 1, 4 if k < 4 else 2))
    return out + [any_pair(random, pairs=other) for _ in range(more)]


def count_question(kind: str, pair: Pair, lang: str) -> str:
    colour, shape = (say(v, lang) for v in pair)
    if lang == "zh":
        what = {"all": "东西", "colour": f"{colour}的东西", "shape": shape, "pair": colour + shape}[kind]
        return f"有几个{what}？"
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    what = {"all": "things", "colour": f"{colour} things", "shape": plural, "pair": f"{colour} {plural}"}[kind]
    return f"How many {what} are there?"


def how_many(truth: dict, kind: str, pair: Pair) -> int:
    match = {
        "all": lambda t: True, "colour": lambda t: t["colour"] == pair[0], "shape": lambda t: t["shape"] == pair[1],
        "pair": lambda t: (t["colour"], t["shape"]) == pair,
    }[kind]  # fmt: skip
    return sum(match(t) for t in truth["things"])


KINDS = ("all", "colour", "shape", "pair")


def counting_picture(
    shot: Shot, random: np.random.Generator, kind: str, k: int, pair: Pair
) -> tuple[Any, dict]:
    """Drawn again until exactly k are there, all of them plain to see."""
    while True:
        things = counting_things(random, kind, k, pair)
        scale = 0.95 if len(things) < 4 else 0.78
        fixed = [(p, {"size": "small"}) if len(things) > 3 else (p, {}) for p in things]
        jpg, truth = shot(random, fixed, scale=scale, limit=0.12)
        if how_many(truth, kind, pair) == k and text.counted(truth, 0) and len(truth["things"]) == len(things):
            return jpg, truth


def _counting(shot: Shot, random, lang: str):
    kind, k = KINDS[int(random.integers(4))], int(random.integers(1, 6))
    pair = any_pair(random)
    jpg, truth = counting_picture(shot, random, kind, k, pair)
    turns = [{"type": "count", "q": count_question(kind, pair, lang), "a": str(k)}]
    for t in truth["things"]:
        other, p = KINDS[int(random.integers(4))], (t["colour"], t["shape"])
        turns.append({"type": "count", "q": count_question(other, p, lang), "a": str(how_many(truth, other, p))})
    if random.random() < 0.3:
        there = {(t["colour"], t["shape"]) for t in truth["things"]}
        p = any_pair(random, without=list(there))
        turns.append({"type": "count", "q": count_question("pair", p, lang), "a": "0"})
    return [truth], [jpg], text.distinct(turns)[:5]


def _vqa(shot: Shot, random, lang: str):
    jpg, truth = shot(random, distinct_pairs(random, int(random.integers(2, 5))), signs=_maybe_sign(random, 0.35))
    return [truth], [jpg], text.still_questions(truth, lang, random)[:7]


def _interleaved(shot: Shot, random, lang: str):
    """2-4 pictures: which shows it, which says it, which has more; or one thing twice: same or not, and in what."""
    if random.random() < 0.4:
        return _twice(shot, random, lang)
    n = int(random.integers(2, 5))
    heroes = distinct_pairs(random, n)
    shots = []
    for i in range(n):
        extra = [any_pair(random, without=heroes) for _ in range(int(random.integers(0, 2)))]
        shots.append(shot(random, [heroes[i], *extra], signs=_maybe_sign(random, 0.3), size=_small(random)))
    truths = [t for _, t in shots]
    turns: list[Turn] = []
    for i in random.permutation(n)[:3]:
        p = phrase(heroes[i][0], heroes[i][1], lang)
        q = f"哪张图有{p}？" if lang == "zh" else f"Which picture shows a {p}?"
        turns.append({"type": "which", "q": q, "a": str(i + 1)})
    said = [s["text"] for t in truths for s in t["signs"]]
    for i, t in enumerate(truths):
        if t["signs"] and said.count(t["signs"][0]["text"]) == 1:
            s = t["signs"][0]["text"]
            q = f"哪张图写着{s}？" if lang == "zh" else f"Which picture says {s}?"
            turns.append({"type": "which", "q": q, "a": str(i + 1)})
        t0 = t["things"][0]
        q = f"第{i + 1}张图里的{say(t0['shape'], lang)}是什么颜色？" if lang == "zh" else (
            f"What colour is the {t0['shape']} in picture {i + 1}?")  # fmt: skip
        if t0 in unique(t, "shape"):
            turns.append({"type": "colour", "q": q, "a": say(t0["colour"], lang)})
    return truths, [j for j, _ in shots], [turns[i] for i in random.permutation(len(turns))][:6]


def _small(random: np.random.Generator) -> tuple[int, int]:
    return SMALL_SIZES[int(random.integers(len(SMALL_SIZES)))]


def change_one(random: np.random.Generator, pair: Pair, material: str, attribute: str) -> tuple[Pair, str]:
    """The same thing but for one attribute, still a pair that training shows."""
    if attribute == "material":
        return pair, str(random.choice([m for m in MATERIALS if m != material]))
    if attribute == "colour":
        pool = [(c, pair[1]) for c in COLOURS if c != pair[0] and (c, pair[1]) in COLOUR_SHAPE]
    else:
        pool = [(pair[0], s) for s in SHAPES if s != pair[1] and (pair[0], s) in COLOUR_SHAPE]
    return pool[int(random.integers(len(pool)))], material


def _twice(shot: Shot, random, lang: str):
    pair, material = any_pair(random), str(random.choice(MATERIALS))
    same = random.random() < 0.5
    attribute = "none" if same else str(random.choice(["colour", "shape", "material"], p=[0.4, 0.4, 0.2]))
    other, stuff = (pair, material) if same else change_one(random, pair, material, attribute)
    shots = [
        shot(random, [(p, {"material": m, "size": "large"})], size=_small(random), scale=1.3)
        for p, m in ((pair, material), (other, stuff))
    ]
    zh = lang == "zh"
    turns = [
        {"type": "same", "q": "两张图是同一个东西吗？" if zh else "Is it the same thing in both?",
         "a": say("yes" if same else "no", lang)},
        {"type": "differ", "q": "哪里不同：颜色、形状、材料，还是没有？" if zh
         else "What differs: colour, shape, material or none?", "a": say(attribute, lang)},
    ]  # fmt: skip
    for i, p in enumerate((pair, other)):
        q = f"第{i + 1}张图里是什么？" if zh else f"What is in picture {i + 1}?"
        turns.append({"type": "what", "q": q, "a": phrase(*p, lang)})
    return [t for _, t in shots], [j for j, _ in shots], turns


FAMILIES: dict[str, Callable] = {
    "caption": _caption, "vit_pairs": _vit_pairs, "ocr": _ocr, "grounding": _grounding, "counting": _counting,
    "vqa": _vqa, "interleaved": _interleaved,
}  # fmt: skip


def numbered(n: int, lang: str, word: tuple[str, str] = ("Picture", "图")) -> list[dict]:
    """The media parts of n pictures; more than one are numbered in the text between them."""
    if n == 1:
        return [{"type": "image", "image": "0.jpg"}]
    parts: list[dict] = []
    for i in range(n):
        label = f"{word[1]}{i + 1}：" if lang == "zh" else f"{word[0]} {i + 1}: "
        parts += [{"type": "text", "text": label}, {"type": "image", "image": f"{i}.jpg"}]
    return parts


def still_sample(seed: int, family: str, index: int) -> dict[str, Any]:
    """One training sample: {"key", "sample", "media": {suffix: jpg}, "truths"}."""
    name = f"{family}-{index:06d}"
    random = rng(seed, "still", name)
    lang = "zh" if random.random() < 0.15 else "en"
    truths, jpgs, turns = FAMILIES[family](picture, random, lang)
    sample = conversation(numbered(len(jpgs), lang), turns, family, {"lang": lang, "truths": truths})
    sample["media"] = media_facts(truths)
    return {"key": name, "sample": sample, "media": {f"{i}.jpg": j for i, j in enumerate(jpgs)}, "truths": truths}


def regions_sample(truth: dict[str, Any], random: np.random.Generator) -> dict[str, Any] | None:
    """The sample "0.jpg" of a picture as an answer that names everything plain to see by colour, material and
    shape, and the letters of a sign, each with its box; None where nothing is plain to see. In English alone: these
    names stand for what is seen (`told`), not for what is said of it."""
    named = regions_in(truth, 0, [unsized(t, "en") for t in truth["things"]])
    if not named:
        return None
    turn = regions_turn("".join(named[i] for i in random.permutation(len(named))))
    sample = conversation(numbered(1, "en"), [turn], "regions", {"lang": "en", "truths": [truth]})
    return {**sample, "media": media_facts([truth])}


def regions_turn(answer: str) -> Turn:
    return {"type": "regions", "q": "Box everything.", "a": answer}


def regions_in(truth: dict[str, Any], k: int, names: list[str]) -> list[str]:
    """At sampled frame k: every thing that is plain to see by its name in `names`, and every letter of a sign, each
    with its boxes. Letters, for a patch shows one or two and hardly ever a word."""
    at = zip(names, truth["boxes"][k], truth["seen"][k], strict=True)
    named = [located(name, [thousand(b, truth) for b in boxes]) for name, boxes, seen in at if seen >= 0.5]
    return named + [
        ocr_text(letter, [thousand(box, truth)])
        for sign in truth["signs"]
        for letter, box in letters(sign["text"], sign["box"], min(truth["width"], truth["height"]))
    ]
