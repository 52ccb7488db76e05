"""Captions, questions and answers about a clip or a still, in English and Chinese, from its truth alone.

A truth is the dict that truth.py makes: things, events, signs, and boxes and visible shares at the sampled frames.
"""

import itertools
from typing import Any

import numpy as np

from data_mix.world.words import COLOUR_SHAPE, MOTIONS, SHAPE_MOTION, full_phrase, phrase, say

Turn = dict[str, str]  # {"q", "a", "type"}

REQUESTS = {
    ("video", "en"): ("Describe the video.", "What happens in the video?", "Caption this clip."),
    ("video", "zh"): ("描述视频。", "视频里发生了什么？", "给视频写一句说明。"),
    ("image", "en"): ("Describe the picture.", "What is in the picture?", "Caption this picture."),
    ("image", "zh"): ("描述图片。", "图里有什么？", "给图片写一句说明。"),
}
SIGN_REQUESTS = {
    "en": ("What does the sign say?", "Read the sign."), "zh": ("牌子上写着什么？", "读出牌子上的字。"),
}  # fmt: skip
_BASE = {
    "slides left": "slide left", "slides right": "slide right", "rises": "rise", "falls": "fall",
    "bounces": "bounce", "splits": "split", "vanishes": "vanish",
}  # fmt: skip
_SEEN = 0.55  # a thing counts where at least this share of it is visible


def short(thing: dict, lang: str) -> str:
    return phrase(thing["colour"], thing["shape"], lang)


def still(lang: str) -> str:
    """What a thing does that does nothing."""
    return "不动" if lang == "zh" else "still"


def long(thing: dict, lang: str) -> str:
    return full_phrase(thing["colour"], thing["shape"], thing["material"], thing["size"], lang)


def join(parts: list[str], lang: str) -> str:
    if lang == "zh":
        return "、".join(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _signs(truth: dict, lang: str) -> str:
    if not truth["signs"]:
        return ""
    text = " ".join(s["text"] for s in truth["signs"])
    return f"牌子上写着{text}。" if lang == "zh" else f" the sign says {text}."


def caption(truth: dict, lang: str) -> str:
    """'a large red glass ring slides left near a blue cube. then a small ... falls. the sign says SALE.'"""
    return (_clip_caption if truth["events"] else _still_caption)(truth, lang) + _signs(truth, lang)


def _clip_caption(truth: dict, lang: str) -> str:
    things, events = truth["things"], truth["events"]
    acting = [e["thing"] for e in events]
    near = [short(t, lang) for i, t in enumerate(things) if i not in acting]
    if lang == "zh":
        text = f"一个{long(things[0], lang)}{say(events[0]['motion'], lang)}"
        text += (f"，旁边有{join(near, lang)}" if near else "") + "。"
        return text + "".join(f"然后{long(things[e['thing']], lang)}{say(e['motion'], lang)}。" for e in events[1:])
    text = f"a {long(things[0], lang)} {events[0]['motion']}"
    text += (" near a " + join(near, lang).replace(", ", ", a ").replace(" and ", " and a ") if near else "") + "."
    return text + "".join(f" then a {long(things[e['thing']], lang)} {e['motion']}." for e in events[1:])


def left_to_right(truth: dict) -> list[int]:
    boxes = truth["boxes"][0]
    return sorted(range(len(boxes)), key=lambda i: (boxes[i][0][0] + boxes[i][0][2]) / 2 if boxes[i] else 0)


def _still_caption(truth: dict, lang: str) -> str:
    order = left_to_right(truth)
    name = long if len(order) <= 2 else short
    names = [name(truth["things"][i], lang) for i in order]
    if lang == "zh":
        return f"从左到右有{join(names, lang)}。" if len(names) > 1 else f"一个{names[0]}。"
    return join([f"a {n}" for n in names], lang) + "."


def dense_caption(truth: dict, lang: str, random: np.random.Generator) -> str:
    """How many there are, then each thing in random order, found by its colour or its shape, with all the rest.

    '2 things. the red thing: large glass ring, slides left, first. the cube: small blue wood, still.' Nothing is
    said twice, so every word has to be looked up in the picture.
    """
    said = [_described(truth, i, lang, random) for i in random.permutation(len(truth["things"]))]
    return _counts(truth, lang) + ("" if lang == "zh" else " ").join(said) + _signs(truth, lang)


def _counts(truth: dict, lang: str) -> str:
    at = ((0, "start", "开头"), (-1, "end", "最后")) if truth["events"] else ((0, "", ""),)
    said = ""
    for sample, en, zh in at:
        n = (count(truth, lang, sample) or {}).get("a")
        if n:
            things = "thing" if n == "1" else "things"
            said += f"{zh}{n}个东西。" if lang == "zh" else f"{n} {things}{' at the ' + en if en else ''}. "
    return said


def _described(truth: dict, i: int, lang: str, random: np.random.Generator) -> str:
    zh, t = lang == "zh", truth["things"][i]
    keys = [k for k in ("colour", "shape") if t in unique(truth, k)]
    key = keys[int(random.integers(len(keys)))] if keys else ""
    named = {"": "一个东西" if zh else "a thing", "colour": say(t["colour"], lang) + ("的东西" if zh else " thing"),
             "shape": say(t["shape"], lang)}[key]  # fmt: skip
    rest = [say(t[k], lang) for k in ("size", "colour", "material", "shape") if k != key]
    words = [("" if zh else " ").join(rest)]
    if truth["events"]:
        acts = [n for n, e in enumerate(truth["events"]) if e["thing"] == i]
        words.append(say(truth["events"][acts[0]]["motion"], lang) if acts else still(lang))
        if acts and len(truth["events"]) > 1:
            words.append((("先", "后") if zh else ("first", "later"))[acts[0]])
    return f"{named}：{'，'.join(words)}。" if zh else f"{'' if not key else 'the '}{named}: {', '.join(words)}."


def counted(truth: dict, sample: int) -> list[int] | None:
    """The parts seen of each thing at sampled frame number `sample`; None where something is half hidden."""
    parts = []
    for boxes, share in zip(truth["boxes"][sample], truth["seen"][sample], strict=True):
        if boxes and share < _SEEN:
            return None
        parts.append(len(boxes))
    return parts


def unique(truth: dict, key: str) -> list[dict]:
    """Things that are alone in having their colour (or shape, or both: key 'pair')."""

    def of(t: dict) -> Any:
        return (t["colour"], t["shape"]) if key == "pair" else t[key]

    values = [of(t) for t in truth["things"]]
    return [t for t in truth["things"] if values.count(of(t)) == 1]


def _t(kind: str, lang: str, en: str, zh: str, answer: str) -> Turn:
    return {"type": kind, "q": zh if lang == "zh" else en, "a": answer}


def attributes(truth: dict, lang: str, random: np.random.Generator, things: list[dict] | None = None) -> list[Turn]:
    """Questions about the colour, shape, material and size of the things (or only of `things`)."""
    pool = truth["things"] if things is None else things
    out = []
    for t in unique(truth, "shape"):
        if t in pool:
            s = say(t["shape"], lang)
            out.append(_t("colour", lang, f"What colour is the {s}?", f"{s}是什么颜色？", say(t["colour"], lang)))
    for t in unique(truth, "colour"):
        if t in pool:
            c = say(t["colour"], lang)
            out.append(
                _t("shape", lang, f"What shape is the {c} thing?", f"{c}的东西是什么形状？", say(t["shape"], lang))
            )
    for t in unique(truth, "pair"):
        if t in pool:
            p = short(t, lang)
            out.append(
                _t("material", lang, f"What is the {p} made of?", f"{p}是什么材料？", say(t["material"], lang))
            )
            out.append(_t("size", lang, f"Is the {p} small or large?", f"{p}是大还是小？", say(t["size"], lang)))
    return [out[i] for i in random.permutation(len(out))]


def present(truth: dict, lang: str, random: np.random.Generator) -> Turn:
    """Is there a red ring? Half yes; a no shares the colour or the shape of something there."""
    t = truth["things"][int(random.integers(len(truth["things"])))]
    pair, answer = (t["colour"], t["shape"]), "yes"
    if random.random() < 0.5:
        pair, answer = absent(truth, t, random), "no"
    p = phrase(*pair, lang)
    return _t("present", lang, f"Is there a {p}?", f"有{p}吗？", say(answer, lang))


def absent(truth: dict, thing: dict, random: np.random.Generator) -> tuple[str, str]:
    """A colour and shape that training shows, that nothing there has, and of which this thing has one."""
    there = {(t["colour"], t["shape"]) for t in truth["things"]}
    near = [p for p in COLOUR_SHAPE if p not in there and (p[0] == thing["colour"]) != (p[1] == thing["shape"])]
    return near[int(random.integers(len(near)))]


def sign(truth: dict, lang: str, random: np.random.Generator) -> Turn:
    if len(truth["signs"]) == 1:
        request = SIGN_REQUESTS[lang][int(random.integers(2))]
        return {"type": "ocr", "q": request, "a": truth["signs"][0]["text"]}
    return _t("sign", lang, "Is there a sign?", "有牌子吗？", say("yes" if truth["signs"] else "no", lang))


def _sign_asked(truth: dict, lang: str, random: np.random.Generator) -> list[Turn]:
    """Always about a sign that is there; seldom about one that is not."""
    return [sign(truth, lang, random)] if truth["signs"] or random.random() < 0.3 else []


def beside(truth: dict, lang: str, random: np.random.Generator) -> list[Turn]:
    """Left or right of one another, where the gap is clear."""
    order, boxes, out = left_to_right(truth), truth["boxes"][0], []
    for a, b in itertools.pairwise(order):
        if not boxes[a] or not boxes[b] or boxes[a][0][2] > boxes[b][0][0] + 4:
            continue
        ta, tb = truth["things"][a], truth["things"][b]
        if ta not in unique(truth, "pair") or tb not in unique(truth, "pair"):
            continue
        left = random.random() < 0.5
        pa, pb = short(ta, lang), short(tb, lang)
        x, y = (pa, pb) if left else (pb, pa)
        out.append(_t("side", lang, f"Is the {x} left or right of the {y}?", f"{x}在{y}的左边还是右边？",
                      say("left" if left else "right", lang)))  # fmt: skip
    return out


def count(truth: dict, lang: str, sample: int = 0, where: str = "") -> Turn | None:
    """How many things are there (at the start / the end of a clip)?"""
    parts = counted(truth, sample)
    if parts is None or not 1 <= sum(parts) <= 5:
        return None
    en = f"How many things are there{' at the ' + where if where else ''}?"
    zh = {"": "", "start": "开头", "end": "最后"}[where] + "有几个东西？"
    return _t("count", lang, en, zh, str(sum(parts)))


def action(truth: dict, event: dict, lang: str) -> Turn:
    p = short(truth["things"][event["thing"]], lang)
    return _t("motion", lang, f"What does the {p} do?", f"{p}做了什么？", say(event["motion"], lang))


def does(truth: dict, event: dict, lang: str, random: np.random.Generator) -> Turn:
    """Does the red ring fall? Half yes; asks no pair of shape and motion that training must not show."""
    t, motion, answer = truth["things"][event["thing"]], event["motion"], "yes"
    if random.random() < 0.5:
        others = [m for m in MOTIONS if m != motion and (t["shape"], m) in SHAPE_MOTION]
        motion, answer = others[int(random.integers(len(others)))], "no"
    p = short(t, lang)
    return _t("does", lang, f"Does the {p} {_BASE[motion]}?", f"{p}{say(motion, lang)}了吗？", say(answer, lang))


def order(truth: dict, lang: str, random: np.random.Generator) -> Turn:
    """Which of the two movers acts first; named in either order."""
    names = [short(truth["things"][e["thing"]], lang) for e in truth["events"]]
    a, b = names if random.random() < 0.5 else names[::-1]
    return _t("order", lang, f"Which acts first: {a} or {b}?", f"谁先动：{a}还是{b}？", names[0])


def actor(truth: dict, lang: str) -> Turn:
    first = " first" if len(truth["events"]) > 1 else ""
    zh = "谁先动？" if first else "谁在动？"
    return _t(
        "actor", lang, f"Which thing acts{first}?", zh, short(truth["things"][truth["events"][0]["thing"]], lang)
    )


def when(truth: dict, event: dict, lang: str) -> Turn:
    p = short(truth["things"][event["thing"]], lang)
    t0, t1 = np.floor(event["t0"] * 2) / 2, min(np.ceil(event["t1"] * 2) / 2, truth["seconds"])
    span = f"<|clip_time_start|>[{t0:.1f},{t1:.1f}]<|clip_time_end|>"
    return _t(
        "when",
        lang,
        f"When does the {p} {_BASE[event['motion']]}?",
        f"{p}什么时候{say(event['motion'], lang)}？",
        span,
    )


def ends(truth: dict, lang: str) -> Turn | None:
    """Left or right at the end, for the first mover."""
    i = truth["events"][0]["thing"]
    boxes = truth["boxes"][-1][i]
    if len(boxes) != 1:
        return None
    x = (boxes[0][0] + boxes[0][2]) / 2 / truth["width"]
    if abs(x - 0.5) < 0.15:
        return None
    p = short(truth["things"][i], lang)
    return _t("end_side", lang, f"Is the {p} left or right at the end?", f"最后{p}在左边还是右边？",
              say("left" if x < 0.5 else "right", lang))  # fmt: skip


def clip_questions(truth: dict, lang: str, random: np.random.Generator, said: str = "") -> list[Turn]:
    """Every question that the clip answers, those about what happens first; `said` is what was told before."""
    events = truth["events"]
    movers = [truth["things"][e["thing"]] for e in events]
    who = order(truth, lang, random) if len(events) > 1 and random.random() < 0.8 else actor(truth, lang)
    acts = [action(truth, e, lang) for e in events]
    more = _mixed([*acts, does(truth, events[int(random.integers(len(events)))], lang, random)], random)
    first = _mixed([who, *more[: int(random.integers(1, 3))]], random)
    rest: list[Turn | None] = [
        *attributes(truth, lang, random, movers)[:4], count(truth, lang, 0, "start"),
        count(truth, lang, -1, "end"), ends(truth, lang), *_sign_asked(truth, lang, random),
        present(truth, lang, random),
        when(truth, events[int(random.integers(len(events)))], lang), *attributes(truth, lang, random)[:2],
    ]  # fmt: skip
    return unspoiled(distinct([t for t in first + _mixed(rest, random) if t]), said)


def still_questions(truth: dict, lang: str, random: np.random.Generator, said: str = "") -> list[Turn]:
    turns: list[Turn | None] = [
        *attributes(truth, lang, random)[:8], *beside(truth, lang, random)[:2], count(truth, lang),
        *_sign_asked(truth, lang, random), present(truth, lang, random), present(truth, lang, random),
    ]  # fmt: skip
    return unspoiled(distinct([t for t in _mixed(turns, random) if t]), said)


def _mixed(turns: list[Any], random: np.random.Generator) -> list[Any]:
    return [turns[i] for i in random.permutation(len(turns))]


def unspoiled(turns: list[Turn], said: str = "") -> list[Turn]:
    """Without the questions whose answer stands in what was said before: they teach copying, not looking.

    Yes and no, numbers and places are kept: they would be skewed, or stand there by chance.
    """
    out: list[Turn] = []
    captioned = bool(said)
    for t in turns:
        telling = t["type"] in ("colour", "shape", "material", "size", "motion", "actor", "ocr", "order")
        if telling and (t["a"] in said or (captioned and t["type"] in ("actor", "order"))):
            continue
        out.append(t)
        said += " " + t["a"] if t["type"] == "order" else f" {t['q']} {t['a']}"
    return out


def distinct(turns: list[Any]) -> list[Turn]:
    asked: set[str] = set()
    return [t for t in turns if not (t["q"] in asked or asked.add(t["q"]))]  # type: ignore[func-returns-value]
