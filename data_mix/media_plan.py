"""From a sample's metadata to what will be shown of its media: nothing is opened here."""

import dataclasses
from typing import Any

from data_mix.sample import media_parts, suffix_of
from mm.common.errors import BadSample
from mm.processor import Processor, VideoPlan
from vision.media import VideoInfo

_VIDEO_FACTS = [f.name for f in dataclasses.fields(VideoInfo)]


def video_plan(facts: dict[str, Any], processor: Processor) -> VideoPlan:
    """The plan of a clip from its "media" facts. Raises BadSample where they are missing or impossible."""
    try:
        info = VideoInfo(**{name: facts[name] for name in _VIDEO_FACTS})
        return processor.video_plan(info)
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise BadSample("the media facts of a video are incomplete") from e


def part_grid(part: dict[str, Any], sample: dict[str, Any], processor: Processor) -> tuple[int, int, int]:
    """(t, h, w) in patches that this image or video part takes in the sequence. Raises BadSample."""
    facts = (sample.get("media") or {}).get(suffix_of(part))
    if not isinstance(facts, dict) or facts.get("kind") != part["type"]:
        raise BadSample("the media facts of a part are missing")
    if part["type"] == "image":
        try:
            return processor.image_grid(facts["width"], facts["height"])
        except (KeyError, TypeError) as e:
            raise BadSample("the media facts of an image are incomplete") from e
    plan = video_plan(facts, processor)
    return (plan.reordered(part["frames"]) if "frames" in part else plan).grid


def media_grids(sample: dict[str, Any], processor: Processor) -> list[tuple[int, int, int]]:
    """The grids of all media parts in reading order. Raises BadSample."""
    return [part_grid(p, sample, processor) for p in media_parts(sample["messages"])]


def caption_of(sample: dict[str, Any]) -> str:
    """The text that goes with the first picture or clip: the first assistant turn. Raises BadSample."""
    for message in sample["messages"]:
        if message["role"] == "assistant":
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


def pair_ids(sample: dict[str, Any], tokenizer: Any, max_text: int) -> list[int]:
    """Ids of the caption, cut to `max_text` with the end mark."""
    return [*tokenizer.encode(caption_of(sample))[: max_text - 1], tokenizer.id("<|im_end|>")]
