"""From a response to an answer, and from an answer to a score. All are pure and never raise on garbage."""

import ast
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_CJK = re.compile(r"[\u3400-\u9fff]")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {w: i for words in (_NUMBERS, "零一二三四五六七八九十") for i, w in enumerate(words)} | {"两": 2}


def normalise(text: str) -> str:
    """NFKC, lower case, one space between words, no quotes or punctuation around."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _strip_punctuation(text)


def _strip_punctuation(text: str) -> str:
    start, stop = 0, len(text)
    while start < stop and _is_punctuation(text[start]):
        start += 1
    while stop > start and _is_punctuation(text[stop - 1]):
        stop -= 1
    return text[start:stop]


def _is_punctuation(c: str) -> bool:
    return c.isspace() or unicodedata.category(c)[0] in "PS"


def strip_tags(text: str) -> str:
    """Without special tokens such as <|ocr_text_start|>."""
    return re.sub(r"<\|[^|<>]*\|>", " ", text)


# ---- choices and words


def mentions(text: str, words: Sequence[str]) -> list[tuple[int, str]]:
    """(position, word) of every whole-word mention, in order; the longest wins where several begin alike."""
    found = []
    for word in words:
        body = re.escape(normalise(word))
        pattern = body if _CJK.search(word) else rf"(?<!\w){body}(?!\w)"
        found += [(m.start(), word) for m in re.finditer(pattern, unicodedata.normalize("NFKC", text).casefold())]
    found.sort(key=lambda f: (f[0], -len(f[1])))
    return [f for i, f in enumerate(found) if i == 0 or f[0] >= found[i - 1][0] + len(found[i - 1][1])]


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice mentioned first."""
    found = mentions(strip_tags(text), choices)
    return found[0][1] if found else None


def only_choice(text: str, choices: Sequence[str]) -> str | None:
    """The one choice the response mentions; None where it mentions none, or several."""
    found = {word for _, word in mentions(strip_tags(text), choices)}
    return found.pop() if len(found) == 1 else None


# ---- numbers


def parse_count(text: str) -> int | None:
    """The one number a response states, as digits or as a word (English, Chinese); several differing: None."""
    text = unicodedata.normalize("NFKC", strip_tags(text)).casefold().replace("一共", "")
    numbers = {int(d) for d in re.findall(r"\d{1,9}", text)}
    if not numbers:
        numbers = {n for w, n in _NUMBER_WORDS.items() if mentions(text, [w])}
    return numbers.pop() if len(numbers) == 1 else None


def parse_sequence(text: str) -> list[int] | None:
    """An order such as `[Video 3, Video 1, Video 2]`, `3, 1, 2` or `3>1>2`: the last bracket if there is one.

    A number that comes twice makes it no order: None.
    """
    text = unicodedata.normalize("NFKC", strip_tags(text))
    brackets = re.findall(r"\[([^\[\]]*\d[^\[\]]*)\]", text)
    numbers = [int(d) for d in re.findall(r"\d{1,4}", brackets[-1] if brackets else text)]
    return numbers if numbers and len(set(numbers)) == len(numbers) else None


# ---- boxes


def parse_box(text: str) -> list[float] | None:
    """The first box, `<|box_start|>[[x1,y1,x2,y2]]<|box_end|>` with or without its tags, in 0..1000.

    Corners in the wrong order are put right; coordinates outside 0..1000 are no box.
    """
    inside = text.partition("<|box_start|>")[2].partition("<|box_end|>")[0] or text
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    found = re.search(r"[\[(]" + ",".join([number] * 4) + r"[\])]", inside)
    if not found:
        return None
    x1, y1, x2, y2 = (float(v) for v in found.groups())
    box = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
    return box if box[0] >= 0 and box[1] >= 0 and box[2] <= 1000 and box[3] <= 1000 else None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (areas - overlap)


# ---- yes and no

_YES, _NO = {"yes", "是"}, {"no", "否"}


def yes_no(text: str) -> str | None:
    """KC-MMBench's rule: after punctuation clean-up a whitespace-separated yes/no/是/否 stands alone.

    Neither, or both: None ("Unknown" in the official code). Answers "yes" or "no".
    """
    words = set(_words(text))
    yes, no = bool(words & _YES), bool(words & _NO)
    return None if yes == no else ("yes" if yes else "no")


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", strip_tags(text)).casefold()
    return "".join(" " if _is_punctuation(c) else c for c in text).split()


def yes_no_list(text: str) -> list[str] | None:
    """`[是, 否, 是]` (the last bracket that holds such a list), `是_否_是`, or a bare row of them."""
    brackets = re.findall(r"[\[【(（]([^\[\]【】()（）]*)[\]】)）]", text)
    for inside in [*reversed(brackets), text]:
        words = _words(inside)
        if words and all(w in _YES | _NO for w in words):
            return ["yes" if w in _YES else "no" for w in words]
    return None


# ---- JSON


def parse_json(text: str) -> dict | None:
    """The last {...} of a response that reads as a dict (JSON, or a Python literal), fences and talk around it."""
    found, start, tries = None, 0, 0
    while (start := text.find("{", start)) >= 0 and (tries := tries + 1) <= 200:
        stop = _closing(text, start)
        value = _read_dict(text[start:stop]) if stop else None
        found = found if value is None else value
        start = start + 1 if value is None else stop
    return found


def _closing(text: str, start: int, limit: int = 4000) -> int:
    """Just after the brace that closes the one at `start`; 0 where none does within `limit` characters."""
    depth, quoted, i = 0, False, start
    while i < min(len(text), start + limit):
        c = text[i]
        if c == "\\":
            i += 1
        elif c == '"':
            quoted = not quoted
        elif not quoted and c in "{}":
            depth += 1 if c == "{" else -1
            if depth == 0:
                return i + 1
        i += 1
    return 0


def _read_dict(text: str) -> dict | None:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def canonical(value: Any) -> Any:
    """Order-free form for comparison: keys sorted, strings normalised, numbers as strings, lists as sorted lists."""
    if isinstance(value, dict):
        return {normalise(str(k)): canonical(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list | tuple | set):
        return sorted((canonical(v) for v in value), key=repr)
    if isinstance(value, bool) or value is None:
        return str(value).casefold()
    return f"{value:g}" if isinstance(value, int | float) else normalise(str(value))
