"""Written descriptions of scenes nobody drew: raw text that teaches the decoder the world's language.

All words and all pairs may come here: a reader of books has met purple balls that no camera showed.
"""

import itertools
from typing import Any

import numpy as np

from data_mix.world import kc, shop, text
from data_mix.world.scene import draw_sign_text
from data_mix.world.stills import Shot, numbered
from data_mix.world.words import COLOUR_SHAPE, COLOURS, MATERIALS, MOTIONS, SHAPES, SIZES, full_phrase, phrase, say
from mm.common.seeds import rng

_ALL = tuple(itertools.product(COLOURS, SHAPES))


def imagined(random: np.random.Generator, *, moving: bool) -> dict[str, Any]:
    """A truth without a picture: things from left to right, events in order."""
    n = int(random.integers(1, 5))
    pairs = [_ALL[i] for i in random.permutation(len(_ALL))[:n]]
    things = [
        {"colour": c, "shape": s, "material": str(random.choice(MATERIALS)), "size": str(random.choice(SIZES))}
        for c, s in pairs
    ]
    boxes = [[[10 + 60 * i, 20, 60 + 60 * i, 70]] for i in range(n)]
    events = []
    if moving:
        for i in range(min(n, 1 + int(random.random() < 0.75))):
            t0 = 0.5 + 1.5 * i
            events.append({"thing": i, "motion": str(random.choice(MOTIONS)), "t0": t0, "t1": t0 + 1.5})
    signs = [{"text": draw_sign_text(random)}] if random.random() < 0.5 else []
    return {"things": things, "events": events, "signs": signs, "boxes": [boxes, boxes], "seen": [[1.0] * n] * 2,
            "width": 20 + 60 * n, "height": 100, "seconds": 4.0}  # fmt: skip


def _questions(truth: dict, lang: str, random) -> list[text.Turn]:
    """Only what the caption says: it names material and size of few things, and no places at the end."""
    said = text.caption(truth, lang)
    if truth["events"]:
        asked = [
            t for t in text.clip_questions(truth, lang, random) if t["type"] not in ("when", "end_side", "count")
        ]
    else:
        asked = text.still_questions(truth, lang, random)
    out = []
    for t in asked:
        if t["type"] in ("material", "size") and not _told(truth, t, lang, said):
            continue
        out.append(t)
    return out


def _told(truth: dict, turn: text.Turn, lang: str, said: str) -> bool:
    """Whether the caption gives the full phrase of the thing that the question is about."""
    return any(
        text.short(t, lang) in turn["q"] and text.long(t, lang) in said for t in truth["things"]
    )  # fmt: skip


def _shop_fact(random, lang: str) -> tuple[str, list[text.Turn]]:
    c, s = _ALL[int(random.integers(len(_ALL)))]
    thing = {"colour": c, "shape": s, "material": str(random.choice(MATERIALS)), "size": str(random.choice(SIZES))}
    price = int(random.integers(3, 100))
    name = full_phrase(c, s, thing["material"], thing["size"], lang)
    title = shop.item_title(thing, lang, random, ["colour", "shape"])
    if lang == "zh":
        said = f"商品：{title}。这是一个{name}，价格¥{price}。"
        return said, [{"q": f"{phrase(c, s, lang)}多少钱？", "a": f"¥{price}", "type": "price"},
                      {"q": "商品是什么颜色？", "a": say(c, lang), "type": "colour"},
                      {"q": "商品是什么材料？", "a": say(thing["material"], lang), "type": "material"}]  # fmt: skip
    said = f"product: {title}. it is a {name} for ¥{price}."
    return said, [{"q": f"What does the {phrase(c, s, lang)} cost?", "a": f"¥{price}", "type": "price"},
                  {"q": "What colour is the product?", "a": c, "type": "colour"},
                  {"q": "What is the product made of?", "a": thing["material"], "type": "material"}]  # fmt: skip


def _gossip(random, lang: str) -> tuple[str, list[text.Turn]]:
    row = shop.comment(random, lang)
    author = str(random.choice(shop.AUTHORS))
    yes = say("yes" if row["rude"] else "no", lang)
    if lang == "zh":
        return f"{author}的视频，评论：{row['text']}。", [{"q": "评论不当吗？", "a": yes, "type": "rude"}]
    return f"a video by {author}. comment: {row['text']}.", [{"q": "Is the comment rude?", "a": yes, "type": "rude"}]


def _drawn(seed: int, name: str) -> tuple[str, str, list[text.Turn]]:
    random = rng(seed, "text", name)
    lang = "zh" if random.random() < 0.15 else "en"
    kind = random.random()
    if kind < 0.82:
        truth = imagined(random, moving=kind < 0.5)
        said, turns = text.caption(truth, lang), _questions(truth, lang, random)
        if random.random() < 0.5:  # what the dense caption scatters, the plain one gathers
            said = f"{text.dense_caption(truth, lang, random)}\n{said}"
    else:
        said, turns = (_shop_fact if kind < 0.94 else _gossip)(random, lang)
    turns = [turns[i] for i in random.permutation(len(turns))]
    if random.random() < 0.7:  # to repeat one of two named things takes practice
        turns.sort(key=lambda t: t["type"] != "order")
    return lang, said, turns[: int(random.integers(2, 8))]


def _twice(seed: int, name: str) -> tuple[str, list[str]]:
    """Things in a row, then the same in another order: once a name has begun, the first line tells how it goes on.
    Nothing teaches so fast to look up what has been said."""
    random = rng(seed, "text", name)
    lang = "zh" if random.random() < 0.3 else "en"
    things = []
    for _ in range(int(random.integers(2, 7))):
        c, s = _ALL[int(random.integers(len(_ALL)))]
        things.append(full_phrase(c, s, str(random.choice(MATERIALS)), str(random.choice(SIZES)), lang))
    comma = "、" if lang == "zh" else ", "
    return lang, [comma.join(things), comma.join(things[i] for i in random.permutation(len(things)))]


def document(seed: int, index: int) -> dict[str, Any]:
    """{"role": "text"}: one in three a description, most often with questions and answers after it; else `_twice`."""
    if index % 3:
        lang, lines = _twice(seed, f"twice-{index:06d}")
    else:
        lang, said, turns = _drawn(seed, f"text-{index:06d}")
        lines = [said] + [f"{t['q']} {t['a']}" for t in turns] * (index % 4 != 0)
    return {"messages": [{"role": "text", "content": "\n".join(lines)}], "family": "text", "meta": {"lang": lang}}


def verdicts(seed: int, index: int) -> dict[str, Any]:
    """{"role": "text"}: nothing but replies to rows of KC-MMBench's shape that compare or put in order. Conversations
    hold few of these among many other words; in single trials a small model hardly learnt from those few that two
    words are the same, or which number is the least."""
    random = rng(seed, "text", f"verdicts-{index:06d}")
    lang = "zh" if random.random() < 0.5 else "en"
    task = str(random.choice(["Video_Topic", "Video_Order"]))
    rows = [kc.MAKERS[task](told(lang), random, lang, COLOUR_SHAPE, int(random.integers(12))) for _ in range(8)]
    return {"messages": [{"role": "text", "content": "\n".join(r["reply"] for r in rows)}], "family": "text",
            "meta": {"lang": lang}}  # fmt: skip


_SHOP = {"CPV": 0.1, "Video_Topic": 0.15, "Video_Order": 0.15, "PornComment": 0.2, "High_like": 0.25, "SPU": 0.15}
_SIDES = {"en": (" on the left.", " in the middle.", " on the right."), "zh": ("在左边。", "在中间。", "在右边。")}


def told(lang: str) -> Shot:
    """What stands for a camera in `kc`: (a caption, its truth), nothing drawn. A place asked for is said."""

    def shot(random, things: list, *, signs: list[str] | None = None, **_: Any) -> tuple[str, dict[str, Any]]:
        full = [t if isinstance(t[1], dict) else (t, {}) for t in things]
        drawn = [
            {"colour": pair[0], "shape": pair[1], "material": fixed.get("material") or str(random.choice(MATERIALS)),
             "size": fixed.get("size") or str(random.choice(SIZES))} for pair, fixed in full
        ]  # fmt: skip
        places = [[[60 * int(x), 20, 60 * int(x) + 50, 70]] for x in random.permutation(len(drawn))]
        truth = {"things": drawn, "events": [], "signs": [{"text": t} for t in signs or []], "boxes": [places]}
        said, x = text.caption(truth, lang), full[0][1].get("x")
        if x is not None:
            said = said.rstrip(".。") + _SIDES[lang][round(2 * x)]
        return said, truth

    return shot


def _in_words(seed: int, index: int) -> dict[str, Any]:
    """A question of KC-MMBench's shape whose pictures are told."""
    random = rng(seed, "text", f"shop-{index:06d}")
    lang = "zh" if random.random() < 0.5 else "en"
    task = str(random.choice(list(_SHOP), p=list(_SHOP.values())))
    row = kc.MAKERS[task](told(lang), random, lang, COLOUR_SHAPE, int(random.integers(12)))
    parts = iter(row["images"])
    said = "".join(p.get("text") or next(parts) + "\n" for p in numbered(len(row["images"]), lang))
    turns = [{"q": said + row["question"], "a": row["reply"]}, *kc.follow_ups(row, lang, random)]
    messages = [{"role": r, "content": t[k]} for t in turns for r, k in (("user", "q"), ("assistant", "a"))]
    return {"messages": messages, "family": "text_chat", "meta": {"lang": lang, "task": task}}


def chat(seed: int, index: int) -> dict[str, Any]:
    """The same as a conversation: the description in the first question. One in three asks what a shop or a video
    site asks (`kc`)."""
    if index % 3 == 2:
        return _in_words(seed, index)
    lang, said, turns = _drawn(seed, f"chat-{index:06d}")
    messages: list[dict] = []
    for i, t in enumerate(turns):
        ask = f"{said}\n{t['q']}" if i == 0 else t["q"]
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": t["a"]}]
    if not messages:
        q = "重复一遍。" if lang == "zh" else "Repeat this."
        messages = [{"role": "user", "content": f"{q}\n{said}"}, {"role": "assistant", "content": said}]
    return {"messages": messages, "family": "text_chat", "meta": {"lang": lang}}
