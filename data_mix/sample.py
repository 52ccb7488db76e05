"""What a sample is: messages whose media parts name members of the same tar entry. Checked in one place."""

from collections.abc import Collection, Iterator
from typing import Any

from mm.common.errors import BadSample

IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"])
VIDEO_SUFFIXES = frozenset(["mp4", "mov", "mkv", "avi", "webm", "m4v", "mpg", "mpeg"])
ROLES = frozenset({"system", "user", "assistant", "text"})
MEDIA_KINDS = ("image", "video")


def media_kind(suffix: str) -> str | None:
    """'0.jpg' -> 'image', 'mp4' -> 'video', anything else -> None."""
    last = suffix.rsplit(".", 1)[-1].lower()
    return "image" if last in IMAGE_SUFFIXES else "video" if last in VIDEO_SUFFIXES else None


def media_parts(messages: list[dict]) -> Iterator[dict]:
    """The image and video parts in reading order."""
    for message in messages:
        if isinstance(message.get("content"), list):
            yield from (p for p in message["content"] if p.get("type") in MEDIA_KINDS)


def suffix_of(part: dict) -> str:
    """The member suffix that a media part names."""
    return part[part["type"]]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook. Raises BadSample where a key comes twice: json would keep the last, silently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise BadSample("a JSON key comes twice")
    return value


def check(sample: Any, members: Collection[str]) -> None:
    """Raise BadSample with a short reason unless `sample` can be rendered with these members.

    Its "told" may say of a picture or clip, by its name, what a member would have shown (`data_mix.regions`).
    """
    if not isinstance(sample, dict):
        raise BadSample("sample is not a JSON object")
    messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadSample("no messages")
    for number, message in enumerate(messages):
        _check_message(message)
        if number and message["role"] in ("system", "text"):
            raise BadSample(f"a {message['role']} message that is not the first")
    told = sample.get("told", {})
    if not isinstance(told, dict) or not all(isinstance(said, str) for said in told.values()):
        raise BadSample("told is not a text for each picture")
    for part in media_parts(messages):
        _check_media(part, {*members, *told})
    if not any(m["role"] in ("assistant", "text") for m in messages):
        raise BadSample("no assistant turn to learn from")


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise BadSample("a message lacks role or content")
    if message["role"] not in ROLES:
        raise BadSample("unknown role")
    content = message["content"]
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadSample("content is neither text nor a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", *MEDIA_KINDS):
            raise BadSample("unknown kind of part")
        if not isinstance(part.get(kind), str):
            raise BadSample(f"a {kind} part lacks its {kind}")
        if kind != "text" and message["role"] == "assistant":
            raise BadSample("an assistant turn holds media")


def _check_media(part: dict, members: Collection[str]) -> None:
    if suffix_of(part) not in members:
        raise BadSample("a part names media that is not in the shard")
    if media_kind(suffix_of(part)) != part["type"]:
        raise BadSample("a part names media of another kind")
    frames = part.get("frames")
    whole = isinstance(frames, list) and all(type(i) is int and i >= 0 for i in frames)
    if frames is not None and not (whole and frames):
        raise BadSample("frames is not a list of frame numbers")
