"""The words of the world in English and Chinese, and the pairs of factors that training never shows."""

import itertools
from typing import NamedTuple

VERSION = "16"
LANGUAGES = ("en", "zh")

SHAPES = ("ball", "cube", "cone", "star", "ring", "cross")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
MATERIALS = ("wood", "metal", "glass", "rubber")
SIZES = ("small", "large")
MOTIONS = ("slides left", "slides right", "rises", "falls", "bounces", "splits", "vanishes")
CLASSES = {
    "shape": SHAPES, "colour": COLOURS, "material": MATERIALS, "size": SIZES, "motion": MOTIONS,
}  # fmt: skip

ZH = {
    "ball": "球", "cube": "方块", "cone": "圆锥", "star": "星星", "ring": "圆环", "cross": "十字",
    "red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "white": "白色",
    "wood": "木头", "metal": "金属", "glass": "玻璃", "rubber": "橡胶", "small": "小", "large": "大",
    "slides left": "向左滑", "slides right": "向右滑", "rises": "上升", "falls": "落下", "bounces": "弹跳",
    "splits": "分裂", "vanishes": "消失", "yes": "是", "no": "否", "left": "左边", "right": "右边",
    "middle": "中间", "top": "上面", "bottom": "下面", "same": "相同", "different": "不同", "colour": "颜色",
    "shape": "形状", "material": "材料", "size": "大小", "none": "没有", "both": "都是",
}  # fmt: skip

# How each colour is lit: sRGB of the thing in plain light.
RGB = {
    "red": (222, 38, 34), "yellow": (246, 206, 20), "green": (34, 166, 60),
    "blue": (38, 92, 232), "purple": (152, 52, 196), "white": (240, 240, 240),
}  # fmt: skip

# Each colour, each shape and six of seven motions lose exactly one partner, so singles stay balanced.
HELD_COLOUR_SHAPE = (
    ("red", "cube"), ("yellow", "ring"), ("green", "star"),
    ("blue", "cone"), ("purple", "ball"), ("white", "cross"),
)  # fmt: skip
HELD_SHAPE_MOTION = (
    ("ball", "rises"), ("cube", "slides left"), ("cone", "falls"),
    ("star", "bounces"), ("ring", "splits"), ("cross", "vanishes"),
)  # fmt: skip

COLOUR_SHAPE = tuple(p for p in itertools.product(COLOURS, SHAPES) if p not in HELD_COLOUR_SHAPE)
SHAPE_MOTION = tuple(p for p in itertools.product(SHAPES, MOTIONS) if p not in HELD_SHAPE_MOTION)

SIGN_WORDS = (
    "SALE", "NEW", "HOT", "TOP", "BEST", "WOW", "FREE", "OPEN", "GIFT", "LIVE", "FUN", "YES", "GO", "STOP",
    "PLAY", "WIN", "BUY", "DEAL", "COOL", "FAST", "GOLD", "MEGA", "SUPER", "LUCKY", "MAGIC", "HAPPY", "SUNNY",
    "MUSIC", "DANCE", "COFFEE", "TEA", "PARK", "SHOP", "CITY", "FARM", "SPORT", "GAME", "LOVE", "STYLE",
    "FRESH",
)  # fmt: skip
SIGN_WORDS_ZH = (
    "新品", "特价", "热卖", "包邮", "好物", "限时", "秒杀", "推荐", "必买", "清仓", "爆款", "上新",
)  # fmt: skip


class Pair(NamedTuple):
    """What a thing is called in short: its colour and its shape."""

    colour: str
    shape: str


def say(word: str, lang: str) -> str:
    """A word of the world in `lang` (English words are their own translation)."""
    return ZH[word] if lang == "zh" else word


def phrase(colour: str, shape: str, lang: str) -> str:
    """'red ring' / '红色圆环'."""
    return ZH[colour] + ZH[shape] if lang == "zh" else f"{colour} {shape}"


def full_phrase(colour: str, shape: str, material: str, size: str, lang: str) -> str:
    """'large red glass ring' / '大的红色玻璃圆环'."""
    if lang == "zh":
        return f"{ZH[size]}的{ZH[colour]}{ZH[material]}{ZH[shape]}"
    return f"{size} {colour} {material} {shape}"


def held_out(colour: str, shape: str, motion: str | None = None) -> bool:
    return (colour, shape) in HELD_COLOUR_SHAPE or (shape, motion) in HELD_SHAPE_MOTION
