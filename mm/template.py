"""From messages to token ids: ChatML segments, each of which knows whether it is trained.

The ids are those of Keye-VL's chat template (rendered, then tokenised), with two differences on purpose: names of
control tokens inside a text stay text, and an answer is a segment of its own, so that what is trained is exactly
what a generation prompt leaves open.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mm.common.errors import BadSample, UserError
from mm.tokenizer import ANSWER, GROUNDING, Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
MEDIA = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
ROLES = ("system", "user", "assistant")

Message = dict[str, Any]
Part = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Pad tokens of one picture or clip: `kind` "image" or "video", first position, how many."""

    kind: str
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """input_ids int64 [L]; loss_mask bool [L], True where the token itself is to be predicted; `spans` of the
    pad tokens in order; `turns`: how many messages were kept."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    spans: list[Span]
    turns: int


@dataclass
class _Ids:
    """Ids as they grow."""

    ids: list[int]
    mask: list[bool]
    spans: list[Span]

    def add(self, ids: Sequence[int], *, trained: bool = False) -> None:
        self.ids.extend(ids)
        self.mask.extend([trained] * len(ids))

    def media(self, kind: str, count: int, tokenizer: Tokenizer) -> None:
        self.add([tokenizer.id("<|vision_start|>")])
        self.spans.append(Span(kind=kind, start=len(self.ids), count=count))
        self.add([tokenizer.id(MEDIA[kind])] * count)
        self.add([tokenizer.id("<|vision_end|>")])


def media_parts(messages: Sequence[Message]) -> list[Part]:
    """The picture and clip parts of a conversation, in the order of their tokens. Raises BadSample."""
    if not isinstance(messages, list | tuple) or not messages:
        raise BadSample("no messages")
    return [
        part for i, m in enumerate(messages) for part in _parts(m, f"message {i + 1}") if part["type"] in MEDIA
    ]


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, media_tokens: Sequence[int], *,
    generate: bool = False, max_tokens: int | None = None,
) -> Encoded:  # fmt: skip
    """Ids and loss mask of one conversation (or one raw document).

    An assistant's text and its <|im_end|> are trained, nothing else. A conversation without a system message
    gets the default one. A single message of role "text" is a document: no frame around it, all text trained,
    <|endoftext|> at its end.

    Args:
        media_tokens: tokens of each picture and clip, in order.
        generate: end with an open assistant turn instead of requiring an answer; then nothing is trained or cut.
        max_tokens: drop whole exchanges from the end until the rest fits.
    Raises:
        BadSample: messages that make no sense, or whose first exchange is longer than `max_tokens`.
        UserError: another number of media counts than of media parts.
    """
    out, turns = _encode(messages, tokenizer, media_tokens, generate, max_tokens)
    return Encoded(
        input_ids=torch.tensor(out.ids, dtype=torch.int64), loss_mask=torch.tensor(out.mask, dtype=torch.bool),
        spans=out.spans, turns=turns,
    )  # fmt: skip


def token_count(
    messages: Sequence[Message], tokenizer: Tokenizer, media_tokens: Sequence[int], *,
    generate: bool = False, max_tokens: int | None = None,
) -> int:  # fmt: skip
    """The length that `encode` would give, without making tensors or a row of pads. Raises as `encode`."""
    small = [1] * len(media_tokens)
    if max_tokens is not None:
        return len(_encode(messages, tokenizer, media_tokens, generate, max_tokens)[0].ids)
    out, _ = _encode(messages, tokenizer, small, generate, None)
    return len(out.ids) + sum(media_tokens) - len(small)


def _encode(
    messages: Sequence[Message], tokenizer: Tokenizer, media_tokens: Sequence[int], generate: bool,
    max_tokens: int | None,
) -> tuple[_Ids, int]:  # fmt: skip
    parts = media_parts(messages)
    _check(messages, generate)
    if len(parts) != len(media_tokens):
        raise UserError(f"{len(parts)} media parts in the messages, but {len(media_tokens)} token counts are given")
    counts = iter(media_tokens)
    out = _Ids([], [], [])
    if messages[0]["role"] == "text":
        _document(messages[0], tokenizer, counts, out)
        ends = [(1, len(out.ids))]
    else:
        ends = _conversation(messages, tokenizer, counts, out)
    if generate:
        out.add([tokenizer.id("<|im_start|>"), *tokenizer.encode("assistant\n")])
        out.mask = [False] * len(out.ids)
        ends = [(len(messages), len(out.ids))]
    if max_tokens is None or len(out.ids) <= max_tokens:
        return out, len(messages)
    return _cut(out, ends, max_tokens)


def _conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, counts: Iterator[int], out: _Ids
) -> list[tuple[int, int]]:
    """Append all turns; returns (messages so far, tokens so far) after each assistant turn."""
    ends = []
    if messages[0]["role"] != "system":
        _turn({"role": "system", "content": DEFAULT_SYSTEM}, tokenizer, counts, out)
    for number, message in enumerate(messages, start=1):
        _turn(message, tokenizer, counts, out)
        if message["role"] == "assistant":
            ends.append((number, len(out.ids)))
    return ends


def _turn(message: Message, tokenizer: Tokenizer, counts: Iterator[int], out: _Ids) -> None:
    role = message["role"]
    out.add([tokenizer.id("<|im_start|>")])
    if role == "assistant":
        out.add(tokenizer.encode("assistant\n"))
        out.add(tokenizer.encode(_text(message), allow=ANSWER), trained=True)
        out.add([tokenizer.id("<|im_end|>")], trained=True)
    else:
        text = f"{role}\n"  # with the text that follows it: one piece for the tokenizer, as in rendered text
        for part in _parts(message, role):
            if part["type"] == "text":
                text += part["text"]
                continue
            out.add(tokenizer.encode(text, allow=GROUNDING))
            out.media(part["type"], next(counts), tokenizer)
            text = ""
        out.add(tokenizer.encode(text, allow=GROUNDING))
        out.add([tokenizer.id("<|im_end|>")])
    out.add(tokenizer.encode("\n"))


def _document(message: Message, tokenizer: Tokenizer, counts: Iterator[int], out: _Ids) -> None:
    for part in _parts(message, "text"):
        if part["type"] == "text":
            out.add(tokenizer.encode(part["text"]), trained=True)
        else:
            out.media(part["type"], next(counts), tokenizer)
    out.add([tokenizer.id("<|endoftext|>")], trained=True)


def _cut(out: _Ids, ends: list[tuple[int, int]], max_tokens: int) -> tuple[_Ids, int]:
    """Keep the longest run of whole exchanges within `max_tokens`."""
    fitting = [(turns, length) for turns, length in ends if length <= max_tokens]
    if not fitting:
        raise BadSample(f"longer than the token budget {max_tokens}")
    turns, length = fitting[-1]
    spans = [s for s in out.spans if s.start < length]
    return _Ids(out.ids[:length], out.mask[:length], spans), turns


# ---- checks


def _check(messages: Sequence[Message], generate: bool) -> None:
    """Raises BadSample, saying which message, unless these are a document or a conversation."""
    for i, message in enumerate(messages):
        where = f"message {i + 1}"
        if message["role"] == "text" and len(messages) > 1:
            raise BadSample(f"{where}: a raw 'text' document stands alone")
        if message["role"] not in (*ROLES, "text"):
            raise BadSample(f"{where} has unknown role {message['role']!r}; known: {', '.join(ROLES)}, text")
        if message["role"] == "system" and i:
            raise BadSample(f"{where}: a system message comes first")
        _check_content(message, where)
    last = messages[-1]["role"]
    if generate and last != "user":
        raise BadSample(f"cannot answer after a {last!r} message; the last one must be the user's")
    if not generate and not any(m["role"] in ("assistant", "text") for m in messages):
        raise BadSample("nothing to train on: no assistant turn")


def _check_content(message: Message, where: str) -> None:
    parts = _parts(message, where)
    if message["role"] not in ("assistant", "text"):
        return
    if message["role"] == "assistant" and any(p["type"] != "text" for p in parts):
        raise BadSample(f"{where}: an assistant turn holds media")
    if not any(p["type"] != "text" or p["text"].strip() for p in parts):
        raise BadSample(f"{where}: empty {message['role']} turn")


def _parts(message: Message, where: str) -> list[Part]:
    """Content as a list of checked parts. Raises BadSample."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadSample(f"{where} has no role")
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"{where} has no content")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" and kind not in MEDIA:
            raise BadSample(f"{where} has a part of unknown type {kind!r}; known: text, image, video")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise BadSample(f"{where} has a text part without text")
        if kind in MEDIA and part.get(kind) is None:
            raise BadSample(f"{where} has a part of type {kind!r} without {kind!r}")
    return content


def _text(message: Message) -> str:
    return "".join(part["text"] for part in _parts(message, message["role"]))
