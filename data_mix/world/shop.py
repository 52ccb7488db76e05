"""The people and the shop: items, authors, titles, comments, likes, series, and users with hidden tastes."""

import math
from typing import Any

import numpy as np

from data_mix.world.stills import any_pair, picture
from data_mix.world.words import COLOURS, MATERIALS, SHAPES, SIZES, full_phrase, phrase, say
from mm.common.seeds import rng

AUTHORS = tuple(
    f"{a}{b}"
    for a in ("mila", "toro", "kiki", "bao", "lumi", "rex", "yuan", "nori")
    for b in ("", "_tv", "88", "lab", "go")
)
TOPICS = ("toys", "kitchen", "garden", "sport", "music", "travel")
RUDE = ("grumbo", "zonk", "blorp", "fligger", "snarf", "dweezle")
RUDE_ZH = ("呆瓜", "笨蛋", "讨厌鬼")
NICE = ("so good", "love it", "nice one", "well made", "more please", "great sound", "wow")
NICE_ZH = ("真好看", "喜欢", "不错", "再来一个", "声音好听", "太棒了")
SPAM = ("follow me for coins", "cheap coins here", "click my page", "win a phone now")
SPAM_ZH = ("加我领红包", "点我主页", "低价金币")
_FLAIR = {
    "en": ("Sunny", "Classic", "Lovely", "Little", "Daily", "Royal"),
    "zh": ("经典", "时尚", "可爱", "日常", "精选", "甄选"),
}
# What people like, as points: the model is never told, but it shows. Held-out pairs spread like the others.
_COLOUR_LIKES = dict(zip(COLOURS, (1.2, -0.8, 0.4, -1.2, 0.8, -0.4), strict=True))
_SHAPE_LIKES = dict(zip(SHAPES, (0.3, 0.6, -0.6, 0.9, -0.9, -0.3), strict=True))
_SIGN_LIKES, _NOISE = 0.7, 0.5


def like_points(colour: str, shape: str, sign: bool) -> float:
    """The part of a clip's popularity that its pictures show."""
    return _COLOUR_LIKES[colour] + _SHAPE_LIKES[shape] + (_SIGN_LIKES if sign else -_SIGN_LIKES)


def likes(points: float, random: np.random.Generator) -> int:
    """A count of likes; above 1000 exactly where points + noise > 0."""
    return round(1000 * math.exp(0.8 * (points + _NOISE * random.standard_normal())))


def like_chance(points: float) -> float:
    """P(more than 1000 likes | what the pictures show)."""
    return 0.5 * (1 + math.erf(points / _NOISE / 2**0.5))


def comment(random: np.random.Generator, lang: str) -> dict[str, Any]:
    """{"text", "lang", "rude", "spam"}."""
    kind = random.choice(3, p=[0.7, 0.2, 0.1])
    nice, rude, spam = (NICE_ZH, RUDE_ZH, SPAM_ZH) if lang == "zh" else (NICE, RUDE, SPAM)
    pool = (nice, rude, spam)[kind]
    words = str(random.choice(pool))
    if kind == 1:
        words = f"你这{words}" if lang == "zh" else f"you {words}"
    return {"text": words, "lang": lang, "rude": bool(kind == 1), "spam": bool(kind == 2)}


def clip_meta(seed: int, name: str, number: int, truth: dict) -> dict[str, Any]:
    """Title, author, comments, likes, series and topic of a clip; the title tells only part."""
    random = rng(seed, "social", name)
    lang = "zh" if random.random() < 0.3 else "en"
    hero = truth["things"][0]
    author = str(random.choice(AUTHORS))
    topic = str(random.choice(TOPICS))
    part = say(str(random.choice([hero["shape"], hero["material"]])), lang)
    title = (
        f"{author}的{part} 第{number % 7 + 1}集"
        if lang == "zh"
        else f"{author} and the {part}, part {number % 7 + 1}"
    )
    points = like_points(hero["colour"], hero["shape"], bool(truth["signs"]))
    return {
        "title": title, "lang": lang, "author": author, "topic": topic,
        "series": {"id": f"{author}-{topic}", "episode": number % 7 + 1},
        "likes": likes(points, random),
        "comments": [comment(random, lang) for _ in range(int(random.integers(1, 5)))],
    }  # fmt: skip


def item_title(thing: dict, lang: str, random: np.random.Generator, told: list[str]) -> str:
    """A product title that tells only the attributes in `told`."""
    flair = str(random.choice(_FLAIR[lang]))
    words = [say(thing[k], lang) for k in ("size", "colour", "material", "shape") if k in told]
    if lang == "zh":
        return flair + "".join(words) + ("" if "shape" in told else "摆件")
    return " ".join([flair, *words, *([] if "shape" in told else ["item"])])


def make_item(seed: int, number: int, pair: tuple[str, str] | None = None) -> dict[str, Any]:
    """One product: {"id", "row": attributes, price, titles, pictures, "media": {file: jpg}}."""
    name = f"item-{number:04d}"
    random = rng(seed, "item", name)
    thing = dict(zip(("colour", "shape"), pair or any_pair(random), strict=True))
    thing |= {"material": str(random.choice(MATERIALS)), "size": str(random.choice(SIZES))}
    media, truths = {}, []
    for view in ("", "-b"):
        fixed = {"material": thing["material"], "size": thing["size"]}
        jpg, truth = picture(random, [((thing["colour"], thing["shape"]), fixed)], size=(160, 160), scale=1.3)
        media[f"{name}{view}.jpg"] = jpg
        truths.append({k: truth[k] for k in ("background", "light", "boxes", "signs")})
    told = [k for k in ("colour", "material", "shape") if random.random() < 0.6]
    row = {
        "id": name, "attributes": thing, "price": int(random.integers(3, 100)), "currency": "¥",
        "title": {lang: item_title(thing, lang, random, told) for lang in ("en", "zh")},
        "name": {lang: full_phrase(thing["colour"], thing["shape"], thing["material"], thing["size"], lang)
                 for lang in ("en", "zh")},
        "short": phrase(thing["colour"], thing["shape"], "en"), "pictures": list(media), "views": truths,
    }  # fmt: skip
    return {"id": name, "row": row, "media": media}


def make_users(seed: int, n: int, clips: list[dict], items: list[dict]) -> list[dict]:
    """Users with a hidden taste for colours, shapes and materials; what they watch and buy, in order, follows it.

    clips, items: rows with "id" and "thing" = {colour, shape, material}.
    """

    def points(rows: list[dict], taste: dict[str, float]) -> np.ndarray:
        return np.array([sum(taste[r["thing"][k]] for k in ("colour", "shape", "material")) for r in rows])

    users = []
    for i in range(n):
        random = rng(seed, "user", i)
        taste = {w: round(float(random.standard_normal()), 2) for w in (*COLOURS, *SHAPES, *MATERIALS)}
        time, history = 0.0, []
        for kind, rows, count in (("watch", clips, 24), ("buy", items, 6)):
            p = np.exp(1.2 * points(rows, taste))
            for j in random.choice(len(rows), min(count, len(rows)), replace=False, p=p / p.sum()):
                history.append({"kind": kind, "id": rows[j]["id"]})
        history = [history[j] for j in random.permutation(len(history))]
        for h in history:
            time += float(random.exponential(300))
            h["t"] = int(time)
        users.append({"id": f"user-{i:04d}", "taste": taste, "history": history})
    return users
