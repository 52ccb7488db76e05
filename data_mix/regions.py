"""Named regions of a picture, as the published grounding format writes them (facts: report 1, section 3.2).

`<|object_ref_start|>red ball<|object_ref_end|><|box_start|>[[x1,y1,x2,y2], ...]<|box_end|>`, and the same with
`ocr_text` around what a sign says; coordinates in [0, 1000).
"""

import re
from typing import Any

from data_mix.media_plan import caption_of
from mm.common.errors import BadSample
from mm.tokenizer import Tokenizer

Box = tuple[int, int, int, int]
_NAMED = re.compile(
    r"<\|(object_ref|ocr_text)_start\|>([^<]+)<\|\1_end\|>\s*<\|box_start\|>\s*(\[\[[^<]*\]\])\s*<\|box_end\|>"
)
_BOX = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]")


def named_boxes(sample: dict[str, Any]) -> list[tuple[str, Box]]:
    """(phrase, (x1, y1, x2, y2) in thousandths) of every region that the caption names, in its order.
    Raises BadSample where there is none, or one that is no box."""
    found = []
    for _, phrase, boxes in _NAMED.findall(caption_of(sample)):
        corners: list[Box] = [(int(a), int(b), int(c), int(d)) for a, b, c, d in _BOX.findall(boxes)]
        if not corners or any(x1 >= x2 or y1 >= y2 or max(x2, y2) > 1000 for x1, y1, x2, y2 in corners):
            raise BadSample("a named region is no box in 0 to 1000")
        found += [(phrase.strip(), box) for box in corners]
    if not found:
        raise BadSample("the caption names no region")
    return found


def in_patches(box: Box, rows: int, columns: int) -> Box:
    """(top, left, bottom, right) of the patches that a box in thousandths touches; at least one."""
    x1, y1, x2, y2 = box
    top, left = min(y1 * rows // 1000, rows - 1), min(x1 * columns // 1000, columns - 1)
    bottom, right = -(-y2 * rows // 1000), -(-x2 * columns // 1000)
    return top, left, max(bottom, top + 1), max(right, left + 1)


def phrase_ids(phrase: str, tokenizer: Tokenizer, max_text: int) -> list[int]:
    """The tokens of a phrase, the first `max_text` of them. Raises BadSample for an empty one."""
    ids = tokenizer.encode(phrase)[:max_text]
    if not ids:
        raise BadSample("a named region has an empty name")
    return ids
