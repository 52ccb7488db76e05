"""From a sample's metadata to what will be shown of its media: nothing is opened here."""

import dataclasses
from typing import Any

from data_mix.sample import media_parts, suffix_of
from mm.common.errors import BadSample
from mm.processor import Processor, VideoPlan
from mm.prompt import media_grids
from vision.media import VideoInfo

_VIDEO_FACTS = [f.name for f in dataclasses.fields(VideoInfo)]


def video_plan(facts: dict[str, Any], processor: Processor) -> VideoPlan:
    """The plan of a clip from its "media" facts. Raises BadSample where they are missing or impossible."""
    try:
        info = VideoInfo(**{name: facts[name] for name in _VIDEO_FACTS})
        return processor.video_plan(info)
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise BadSample("the media facts of a video are incomplete") from e


def shown(part: dict[str, Any], sample: dict[str, Any], processor: Processor) -> VideoPlan | None:
    """The plan of a clip part, with the frames that it names alone; None of a picture. Raises BadSample."""
    if part["type"] == "image":
        return None
    plan = video_plan((sample.get("media") or {}).get(suffix_of(part)) or {}, processor)
    return plan.reordered(part["frames"]) if "frames" in part else plan


def frames_shape(part: dict[str, Any], sample: dict[str, Any], processor: Processor) -> tuple[int, int, int]:
    """[T, H, W] that decoding this part must give, before any re-ordering. Raises BadSample."""
    whole = {name: value for name, value in part.items() if name != "frames"}
    t, h, w = part_grid(whole, sample, processor)
    return t, h * processor.patch_size, w * processor.patch_size


def part_grid(part: dict[str, Any], sample: dict[str, Any], processor: Processor) -> tuple[int, int, int]:
    """(t, h, w) in patches that one image or video part takes in the sequence. Raises BadSample."""
    message = {"role": "user", "content": [part]}
    return media_grids([message], sample.get("media") or {}, processor)[0]


def caption_of(sample: dict[str, Any]) -> str:
    """The text that goes with the first picture or clip: the first assistant turn, or a document's text.
    Raises BadSample."""
    for message in sample["messages"]:
        if message["role"] in ("assistant", "text"):
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(p["text"] for p in content if p["type"] == "text")
            if content.strip():
                return content.strip()
    raise BadSample("no caption to pair with the media")


def first_media(sample: dict[str, Any]) -> dict[str, Any]:
    """The first image or video part. Raises BadSample where there is none."""
    for part in media_parts(sample["messages"]):
        return part
    raise BadSample("no media to pair with the caption")


def only_media(sample: dict[str, Any]) -> dict[str, Any]:
    """The one picture or clip of a sample whose caption names regions. Raises BadSample for anything else."""
    parts = list(media_parts(sample["messages"]))
    if len(parts) != 1:
        raise BadSample("regions are named in one picture or clip; this sample has other media")
    return parts[0]


def pair_ids(sample: dict[str, Any], tokenizer: Any, max_text: int) -> list[int]:
    """Ids of the caption, as `Tokenizer.caption` makes them."""
    return tokenizer.caption(caption_of(sample), max_text)
