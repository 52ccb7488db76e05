"""Named regions of a picture or clip, as the published grounding format writes them (facts: report 1, section 3.2).

`<|object_ref_start|>red ball<|object_ref_end|><|box_start|>[[x1,y1,x2,y2], ...]<|box_end|>`, and the same with
`ocr_text` around what a sign says; coordinates in [0, 1000). In a clip a span of seconds,
`<|clip_time_start|>[0.0,0.5]<|clip_time_end|>`, says when the boxes that follow it are right.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_mix.media_plan import caption_of
from mm.common.errors import BadSample
from mm.processor import VideoPlan
from mm.tokenizer import Tokenizer

Box = tuple[int, int, int, int]
_PART = re.compile(
    r"<\|clip_time_start\|>(?P<span>[^<]*)<\|clip_time_end\|>"
    r"|<\|(?P<tag>object_ref|ocr_text)_start\|>(?P<phrase>[^<]+)<\|(?P=tag)_end\|>\s*"
    r"<\|box_start\|>\s*(?P<boxes>\[\[[^<]*\]\])\s*<\|box_end\|>"
)
_BOX = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]")
_SPAN = re.compile(r"\s*\[\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\]\s*")


@dataclass(frozen=True)
class Region:
    """`box`: (x1, y1, x2, y2) in thousandths; `span`: the seconds [from, to) in which it is right, None for all."""

    phrase: str
    box: Box
    span: tuple[float, float] | None = None

    def frames(self, plan: VideoPlan | None) -> list[int]:
        """The places, among the frames shown of a clip (of a picture: None), at which it is right."""
        if plan is None:
            return [0]
        start, end = self.span or (0.0, float("inf"))
        return [i for i, t in enumerate(plan.times.tolist()) if start <= t < end]


class Names:
    """How the names of a data set go on: what each word (token) has to be told from.

    In place of a word could stand whatever stands beside it after some beginning of as many words: after "blue wood"
    come all shapes, so after "red wood" all could. Of these, the rivals are what no name keeps apart from any word of
    the beginning: that the data hold no red cube is no reason to learn that what is red is no cube. So colours are
    told from colours and shapes from shapes, but never "cube" from what is red.

    Words stand for places here: in names of one data set a place must mean the same kind of word.

    Attributes: words, int64 [U], ascending: all that stand in names.
    """

    def __init__(self, names: Iterable[Sequence[int]]):
        distinct = set(map(tuple, names))
        self.words = np.array(sorted({word for name in distinct for word in name}), dtype=np.int64)
        self._apart = np.ones((len(self.words), len(self.words)), dtype=bool)  # no name has both
        follow: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for name in distinct:
            at = np.searchsorted(self.words, name)
            self._apart[np.ix_(at, at)] = False
            for i, word in enumerate(at):
                follow[name[:i]].add(int(word))
        beside: dict[tuple[int, int], set[int]] = defaultdict(set)  # (length of the beginning, word), in columns
        for start, after in follow.items():
            for word in after:
                beside[len(start), word] |= after
        self._rivals = {  # (beginning, word that goes on) -> columns of its rivals, itself among them
            (start, int(self.words[word])): self._together(start, np.array(sorted(beside[len(start), word])))
            for start, after in follow.items() for word in after
        }  # fmt: skip

    def _together(self, start: tuple[int, ...], columns: np.ndarray) -> np.ndarray:
        apart = self._apart[np.searchsorted(self.words, start)][:, columns].any(0)
        return columns[~apart]

    def rivals(self, name: Sequence[int]) -> np.ndarray:
        """bool [len(name), U]: for each token of a name of the data, its rivals and itself."""
        rivals = np.zeros((len(name), len(self.words)), dtype=bool)
        for i, word in enumerate(name):
            rivals[i, self._rivals[tuple(name[:i]), word]] = True
        return rivals


def named_regions(sample: dict[str, Any]) -> list[Region]:
    """Every region that the caption names, in its order. Raises BadSample as `regions_of`."""
    return regions_of(caption_of(sample))


def regions_of(text: str) -> list[Region]:
    """Every region that the text names, in its order.
    Raises BadSample where there is none, or one that is no box or no span."""
    found, span = [], None
    for part in _PART.finditer(text):
        if part["span"] is not None:
            span = _span(part["span"])
            continue
        corners: list[Box] = [(int(a), int(b), int(c), int(d)) for a, b, c, d in _BOX.findall(part["boxes"])]
        if not corners or any(x1 >= x2 or y1 >= y2 or max(x2, y2) > 1000 for x1, y1, x2, y2 in corners):
            raise BadSample("a named region is no box in 0 to 1000")
        if not part["phrase"].strip():
            raise BadSample("a named region has an empty name")
        found += [Region(part["phrase"].strip(), box, span) for box in corners]
    if not found:
        raise BadSample("the caption names no region")
    return found


def _span(text: str) -> tuple[float, float]:
    match = _SPAN.fullmatch(text)
    if not match or not float(match[1]) < float(match[2]):
        raise BadSample("the time of a named region is no [start,end] in seconds")
    return float(match[1]), float(match[2])


def in_patches(box: Box, rows: int, columns: int) -> Box:
    """(top, left, bottom, right) of the patches that a box in thousandths touches; at least one."""
    x1, y1, x2, y2 = box
    top, left = min(y1 * rows // 1000, rows - 1), min(x1 * columns // 1000, columns - 1)
    bottom, right = -(-y2 * rows // 1000), -(-x2 * columns // 1000)
    return top, left, max(bottom, top + 1), max(right, left + 1)


def said(phrase: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a name as it stands in a sentence, after a blank that is part of its first token or left out; of
    a single letter as it stands in a word."""
    if len(phrase) == 1:
        return tokenizer.encode(phrase)
    ids = tokenizer.encode(f" {phrase}")
    return ids[ids[0] == tokenizer.encode(" ")[0] :]


def phrase_ids(phrase: str, tokenizer: Tokenizer, max_text: int) -> list[int]:
    """The tokens of a phrase as said, cut to `max_text` with the end mark."""
    return [*said(phrase, tokenizer)[: max_text - 1], tokenizer.id("<|im_end|>")]
