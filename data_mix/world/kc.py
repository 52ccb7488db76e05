"""Six tasks in the shape of KC-MMBench: covers and product pictures as images, then one question.

Each maker returns {"question", "answer", "reply", "images": [jpg], "meta"}. `reply` is how training answers: where
videos are to be compared or put in order it first says what is in each, then the answer. `pairs` are the (colour,
shape) pairs its heroes may have: those of training, or the held-out ones; `shot` takes the pictures (`picture`), or
tells them in words.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_mix.world import shop
from data_mix.world.scene import draw_sign_text
from data_mix.world.stills import Pair, Shot, any_pair, change_one, picture, unsized
from data_mix.world.text import Turn
from data_mix.world.words import (
    COLOUR_SHAPE,
    COLOURS,
    HELD_COLOUR_SHAPE,
    MATERIALS,
    SHAPES,
    phrase,
    say,
)
from mm.common.seeds import rng

Pairs = Sequence[Pair]
# The Chinese suffix is KC-MMBench's own (published format); the English one says the same.
SUFFIX = {
    "zh": "\n请直接给出结论，回答是或者否，不需要做额外分析，并且不许回答不确定",
    "en": "\nAnswer yes or no directly, without any analysis; not sure is no answer",
}
TASKS = ("CPV", "Video_Topic", "Video_Order", "PornComment", "High_like", "SPU")
_COVER = ((128, 176), (152, 152), (176, 128))
_VALUES = {"colour": COLOURS, "shape": SHAPES, "material": MATERIALS}


def _size(random: np.random.Generator) -> tuple[int, int]:
    return _COVER[int(random.integers(3))]


def _cover(
    shot: Shot, random, pair: Pair, *, others: int = 1, sign: str | None = None, **fixed: Any
) -> tuple[Any, dict]:
    """The cover of a video about one large thing, `others` small ones beside it."""
    things: list = [(pair, {"size": "large", **fixed})]
    taken = [pair]
    for _ in range(others):
        taken.append(any_pair(random, without=[p for p in COLOUR_SHAPE if p in taken or p[1] == pair[1]]))
        things.append((taken[-1], {"size": "small"}))
    return shot(random, things, signs=[sign] if sign else [], size=_size(random), scale=1.05)


def item(shot: Shot, random, pair: Pair, material: str, size: str = "large") -> tuple[Any, dict]:
    return shot(random, [(pair, {"material": material, "size": size})], size=_size(random), scale=1.3)


def _row(question: str, answer: str, shots: list[tuple[Any, dict]], reply: str = "", **meta: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, "reply": reply or answer, "images": [j for j, _ in shots],
            "meta": {**meta, "truths": [t for _, t in shots]}}  # fmt: skip


def _yes(answer: bool, lang: str) -> str:
    return say("yes" if answer else "no", lang)


def cpv(shot: Shot, random, lang: str, pairs: Pairs, target: int) -> dict[str, Any]:
    """Two attributes of a product; the title tells one of them, the picture the other."""
    pair = any_pair(random, pairs=pairs)
    thing = {"colour": pair[0], "shape": pair[1], "material": str(random.choice(MATERIALS)), "size": "large"}
    keys = list(random.permutation(["colour", "shape", "material"])[:2])
    told = keys[int(random.integers(2))] if random.random() < 0.6 else "size"
    made = item(shot, random, pair, thing["material"])
    title = shop.item_title(thing, lang, random, [told])
    names = [say(k, lang) for k in keys]
    options = "；".join(
        f"{n}：{'、'.join(say(v, lang) for v in _VALUES[k])}" for k, n in zip(keys, names, strict=True)
    )
    if lang == "zh":
        question = f"商品标题：{title}\n请给出商品属性，可选值：{options}\n以JSON回答。"
    else:
        options = "; ".join(f"{k}: {', '.join(_VALUES[k])}" for k in keys)
        question = f"Product title: {title}\nGive the attributes. Allowed values: {options}\nAnswer in JSON."
    values = {n: say(thing[k], lang) for k, n in zip(keys, names, strict=True)}
    return _row(question, json.dumps(values, ensure_ascii=False), [made], pair=pair, told=told, keys=keys)


def video_topic(shot: Shot, random, lang: str, pairs: Pairs, target: int) -> dict[str, Any]:
    """Covers of three videos: have the second and the third the topic (the main thing's shape) of the first?"""
    pair = any_pair(random, pairs=pairs)
    wanted = [bool(target & 1), bool(target & 2)]
    shots = [_cover(shot, random, pair)]
    for same in wanted:
        pool = [p for p in COLOUR_SHAPE if (p[1] == pair[1]) == same and (p[0] != pair[0] or not same)]
        shots.append(_cover(shot, random, any_pair(random, pairs=pool)))
    if lang == "zh":
        question = (
            "三个视频的封面如上，主题是最大的东西的形状。视频2和视频3与视频1主题相同吗？依次回答是或否，用_连接。"
        )
    else:
        question = ("These are the covers of three videos; the topic is the shape of the largest thing. Have video 2 "
                    "and video 3 the topic of video 1? Answer yes or no for each, joined by _.")  # fmt: skip
    answer = "_".join(_yes(w, lang) for w in wanted)
    first, *others = (say(truth["things"][0]["shape"], lang) for _, truth in shots)
    reply = ", ".join(f"{first} {o} {_yes(o == first, lang)}" for o in others) + f". [{answer}]"
    return _row(question, answer, shots, reply, pair=pair)


_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def video_order(shot: Shot, random, lang: str, pairs: Pairs, target: int) -> dict[str, Any]:
    """Three episodes of a series, shuffled: the sign counts, or things grow in number, or the hero walks right."""
    pair, material = any_pair(random, pairs=pairs), str(random.choice(MATERIALS))
    kind = ("sign", "number", "walk")[int(random.integers(3))]
    first = int(random.integers(1, 4))
    episodes, steps = [], [say(w, lang) for w in ("left", "middle", "right")] if kind == "walk" else []
    for i in range(3):
        if kind == "sign":
            text = f"第{first + i}集" if lang == "zh" else f"EP {first + i}"
            others = int(random.integers(0, 2))
            episodes.append(_cover(shot, random, pair, others=others, sign=text, material=material))
            steps.append(str(first + i))
        elif kind == "number":
            episodes.append(_crowd(shot, random, pair, material, i + 1))
            steps.append(str(i + 1))
        else:
            hero = [(pair, {"material": material, "size": "large", "x": 0.05 + 0.45 * i})]
            episodes.append(shot(random, hero, size=_size(random), scale=0.9))
    order = _ORDERS[target % 6]  # shown position k holds episode order[k]
    answer = "[" + ", ".join(f"Video {order.index(i) + 1}" for i in range(3)) + "]"
    rule = {
        "sign": ("集数", "the episode number"), "number": ("东西的个数", "the number of things"),
        "walk": ("主角向右的位置", "how far right the hero is"),
    }[kind]  # fmt: skip
    if lang == "zh":
        question = f"三个视频属于同一系列，按{rule[0]}从小到大排序，例如[Video 2, Video 1, Video 3]。"
    else:
        question = (f"Three videos of one series. Order them by {rule[1]}, least first, "
                    "like [Video 2, Video 1, Video 3].")  # fmt: skip
    shown = [episodes[i] for i in order]
    reply = ", ".join(f"{steps[i]}: Video {k}" for k, i in enumerate(order, start=1)) + f". {answer}"
    return _row(question, answer, shown, reply, pair=pair, kind=kind)


def _crowd(shot: Shot, random, pair: Pair, material: str, n: int) -> tuple[Any, dict]:
    while True:
        fixed = {"material": material, "size": "small"}
        made, truth = shot(random, [(pair, fixed)] * n, size=_size(random), limit=0.1)
        if len(truth["things"]) == n:
            return made, truth


def rude_comment(shot: Shot, random, lang: str, pairs: Pairs, target: int) -> dict[str, Any]:
    """Is the comment rude? Half by its words alone; half only given what the cover shows.

    The rule for the second kind stands in the question: to call what the video shows ugly is rude.
    """
    pair, rude = any_pair(random, pairs=pairs), bool(target & 1)
    made = _cover(shot, random, pair)
    by_words = random.random() < 0.5
    if by_words:
        nice, bad = (shop.NICE_ZH, shop.RUDE_ZH) if lang == "zh" else (shop.NICE, shop.RUDE)
        words = str(random.choice(bad if rude else nice))
        comment = (f"你这{words}" if lang == "zh" else f"you {words}") if rude else words
    else:
        shown = pair
        if not rude:
            there = [(t["colour"], t["shape"]) for t in made[1]["things"]]
            shown = any_pair(random, without=[p for p in COLOUR_SHAPE if p in there or p[1] == pair[1]])
        p = phrase(*shown, lang)
        comment = f"{p}真丑" if lang == "zh" else f"{p} is ugly"
    part = say(made[1]["things"][0]["material"], lang)
    if lang == "zh":
        question = f"标题：{part}的一天\n评论：{comment}\n骂人，或说视频里的东西丑，就是不当评论。这条评论不当吗？"
    else:
        question = (f"Title: a {part} day\nComment: {comment}\nRude words, or calling a thing in the video ugly, "
                    "make a comment rude. Is this comment rude?")  # fmt: skip
    ugly = None if by_words else shown
    return _row(question + SUFFIX[lang], _yes(rude, lang), [made], pair=pair, by_words=by_words, ugly=ugly)


def high_like(shot: Shot, random, lang: str, pairs: Pairs, target: int) -> dict[str, Any]:
    """More than 1000 likes? A hidden rule of colour, shape and sign, plus noise: the ceiling is Bayes'."""
    wanted = bool(target & 1)
    while True:
        pair, sign = any_pair(random, pairs=pairs), random.random() < 0.5
        points = shop.like_points(*pair, sign)
        n = shop.likes(points, random)
        if (n > 1000) == wanted:
            break
    made = _cover(shot, random, pair, sign=draw_sign_text(random) if sign else None)
    part = say(made[1]["things"][0]["material"], lang)
    if lang == "zh":
        question = f"标题：{part}的故事\n看封面，这个视频的点赞超过1000吗？"
    else:
        question = f"Title: a {part} story\nBy its cover, does this video get more than 1000 likes?"
    return _row(question + SUFFIX[lang], _yes(wanted, lang), [made], pair=pair, likes=n, sign=sign)


def spu(shot: Shot, random, lang: str, pairs: Pairs, target: int) -> dict[str, Any]:
    """Two pictures: the same product (colour, shape, material)? A no differs in exactly one attribute."""
    pair, material, same = any_pair(random, pairs=pairs), str(random.choice(MATERIALS)), bool(target & 1)
    other, stuff, attribute = pair, material, "none"
    if not same:
        attribute = str(random.choice(["colour", "shape", "material"], p=[0.45, 0.45, 0.1]))
        other, stuff = change_one(random, pair, material, attribute)
    thing = {"colour": pair[0], "shape": pair[1], "material": material, "size": "large"}
    titles = [shop.item_title(thing, lang, random, []) for _ in range(2)]
    shots = [item(shot, random, pair, material), item(shot, random, other, stuff)]
    if random.random() < 0.5:
        shots.reverse()
    if lang == "zh":
        question = f"商品A：{titles[0]}\n商品B：{titles[1]}\n两张图是同款商品吗？"
    else:
        question = f"Product A: {titles[0]}\nProduct B: {titles[1]}\nAre the two pictures of the same product?"
    return _row(question + SUFFIX[lang], _yes(same, lang), shots, pair=pair, differ=attribute)


def follow_ups(row: dict[str, Any], lang: str, random: np.random.Generator) -> list[Turn]:
    """What may be asked after a row's own question, so that its pictures are learnt from whatever the answer was: up
    to five questions about single pictures; where there are several, one or two, and up to five that compare them."""
    truths, zh = row["meta"]["truths"], lang == "zh"
    single = [t for i, truth in enumerate(truths) for t in _about(row, truth, i, lang, random)]
    if ugly := row["meta"].get("ugly"):
        single.append({"type": "ugly", "q": "评论说什么丑？" if zh else "What does the comment call ugly?",
                       "a": phrase(ugly[0], ugly[1], lang)})  # fmt: skip
    compared: list[Turn] = []
    if len(truths) > 1 and "kind" not in row["meta"]:  # the largest things of a series are the same
        compared = compare([t["things"][0] for t in truths], lang)
    few = (1, 3) if compared else (3, 6)
    turns = [pool[i] for pool, n in ((compared, (3, 6)), (single, few))
             for i in random.permutation(len(pool))[: random.integers(*n)]]  # fmt: skip
    return [turns[i] for i in random.permutation(len(turns))]


def _about(row: dict[str, Any], truth: dict, i: int, lang: str, random: np.random.Generator) -> list[Turn]:
    """Of picture `i`: what it shows, whether that is a certain thing, is liked, has a sign."""
    zh, thing, sign = lang == "zh", truth["things"][0], bool(truth["signs"])
    where = (f"图{i + 1}里" if zh else f" in picture {i + 1}") if len(row["images"]) > 1 else ""
    pair, right = (thing["colour"], thing["shape"]), random.random() < 0.5
    if not right:
        pair, _ = change_one(random, pair, "", str(random.choice(["colour", "shape"])))
    p = phrase(*pair, lang)
    liked = row["meta"].get("likes") or shop.likes(shop.like_points(thing["colour"], thing["shape"], sign), random)
    asked = (
        ("what", f"{where}最大的东西是什么？" if zh else f"What is the largest thing{where}?", unsized(thing, lang)),
        ("sign", f"{where}有牌子吗？" if zh else f"Is there a sign{where}?", _yes(sign, lang)),
        ("is", f"{where}最大的东西是{p}吗？" if zh else f"Is the largest thing{where} a {p}?", _yes(right, lang)),
        ("likes", f"{where}点赞超过1000吗？" if zh else f"More than 1000 likes{where}?", _yes(liked > 1000, lang)),
    )
    return [{"type": kind, "q": q, "a": answer} for kind, q, answer in asked]


def compare(things: Sequence[dict], lang: str) -> list[Turn]:
    """Of the largest things of pictures: every attribute in each, and what those of two have in common and what not.
    Most want words for an answer: in single trials no model learnt to compare from yes and no alone."""
    zh, keys = lang == "zh", ("colour", "shape", "material")
    comma, none = "、" if zh else ", ", say("none", lang)
    out: list[Turn] = []
    if len(things) > 2:
        for key in keys:
            q = f"每张图里最大的东西是什么{say(key, lang)}？" if zh else f"What {key} is the largest thing in each?"
            out.append({"type": "each", "q": q, "a": comma.join(say(t[key], lang) for t in things)})
            q = (f"哪些图里最大的东西和图1的{say(key, lang)}相同？" if zh
                 else f"In which pictures has the largest thing the same {key} as in picture 1?")  # fmt: skip
            as_first = [str(i + 1) for i, t in enumerate(things) if i and t[key] == things[0][key]]
            out.append({"type": "like the first", "q": q, "a": comma.join(as_first) or none})
    for (i, a), (j, b) in itertools.combinations(enumerate(things), 2):
        of = f"图{i + 1}和图{j + 1}里最大的东西" if zh else f"the largest things in pictures {i + 1} and {j + 1}"
        if len(things) == 2:
            of = "两张图" if zh else "the two pictures"
        common = [say(a[k], lang) for k in keys if a[k] == b[k]]
        apart = [f"{say(a[k], lang)} {say(b[k], lang)}" for k in keys if a[k] != b[k]]
        out.append({"type": "common", "q": f"{of}有什么相同？" if zh else f"What do {of} have in common?",
                    "a": comma.join(common) or none})  # fmt: skip
        out.append({"type": "apart", "q": f"{of}有什么不同？" if zh else f"What differs between {of}?",
                    "a": comma.join(apart) or none})  # fmt: skip
        for key in keys:
            q = f"{of}{say(key, lang)}相同吗？" if zh else f"Have {of} the same {key}?"
            out.append({"type": "same", "q": q, "a": _yes(a[key] == b[key], lang)})
    return out


MAKERS: dict[str, Callable] = dict(
    zip(TASKS, (cpv, video_topic, video_order, rude_comment, high_like, spu), strict=True)
)


def kc_row(seed: int, task: str, split: str, index: int) -> dict[str, Any]:
    """Row `index` of a task: even ones Chinese, odd ones English; answers go round so that none prevails."""
    random = rng(seed, "kc", task, split, index)
    lang = "zh" if index % 2 == 0 else "en"
    pairs = HELD_COLOUR_SHAPE if split == "unseen" else COLOUR_SHAPE
    return {**MAKERS[task](picture, random, lang, pairs, index // 2), "lang": lang, "split": split, "task": task}


def ceilings(pairs: Pairs = COLOUR_SHAPE) -> dict[str, float]:
    """Accuracy of an oracle that sees the whole truth: 1, but for likes, where noise remains.

    Rows of High_like are drawn to half yes and half no, so the posterior is reweighted by the prior of each answer.
    """
    chance = np.array([shop.like_chance(shop.like_points(*p, s)) for p in pairs for s in (False, True)])
    yes, no = chance / chance.sum() / 2, (1 - chance) / (1 - chance).sum() / 2
    return {t: round(float(np.maximum(yes, no).sum()), 4) if t == "High_like" else 1.0 for t in TASKS}
