"""Conversations in the JSON that LLaVA, LLaMA-Factory and ms-swift read, and the OpenAI-like form of parts."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_mix.foreign import Items, Media, Record, suffix_for
from data_mix.sample import media_kind, once
from mm.common.errors import BadSample, UserError

MARKS = re.compile(r"(<image>|<video>|<audio>)")
LISTS = {"image": ("images", "image"), "video": ("videos", "video"), "audio": ("audios", "audio")}
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
Find = Callable[[str], Callable[[], bytes]]
NO_AUDIO = "audio is not supported yet"


def read_llava(src: str | Path, *, media_root: str | Path | None = None) -> Items:
    """Records of a .json (a list) or .jsonl file, or of all such files in a folder.

    Raises UserError where `src` holds no such file or a file is not JSON at all; a broken line is a BadSample.
    """
    src = Path(src)
    files = sorted([*src.glob("*.json"), *src.glob("*.jsonl")]) if src.is_dir() else [src]
    if not files:
        raise UserError(f"{src} holds no .json or .jsonl file")
    media = Media(media_root or (src if src.is_dir() else src.parent))
    for file in files:
        stem = re.sub(r"[^\w-]", "_", file.stem)
        for number, row in enumerate(_rows(file)):
            key = f"{stem}-{number:07d}"
            try:
                if isinstance(row, BadSample):
                    raise row
                yield convert(key, row, media.reader)
            except BadSample as e:
                yield BadSample(e.reason, shard=file.name, key=key)


def _rows(file: Path) -> Iterator[Any]:
    try:
        raw = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}") from e
    if file.suffix == ".jsonl" or raw[:1] == b"{":
        for line in raw.split(b"\n"):
            if line.strip():
                yield parse_line(line)
        return
    try:
        rows = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is not JSON: {e}; mend it, or give one JSON object per line as .jsonl") from e
    if not isinstance(rows, list):
        raise UserError(f"{file} is not a list of conversations")
    yield from rows


def parse_line(line: bytes) -> Any:
    """One JSON value, or the BadSample that says why not."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        return BadSample("text is not UTF-8")
    except (ValueError, RecursionError):
        return BadSample("broken JSON")


def _once(pairs: list[tuple[str, Any]]) -> Any:
    """An object, or the BadSample that says why not: in a list of rows the others are still good."""
    try:
        return once(pairs)
    except BadSample as e:
        return e


def convert(key: str, row: Any, find: Find) -> Record:
    """One conversation; `find` gives a way to the bytes of a file it names. Raises BadSample where it cannot be
    rendered as it is meant."""
    if not isinstance(row, dict):
        raise BadSample("sample is not a JSON object")
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample("no messages")
    names = {kind: _names(row, keys) for kind, keys in LISTS.items()}
    if names["audio"]:
        raise BadSample(NO_AUDIO)
    build = _Builder(find, names)
    messages = [build.message(turn) for turn in turns]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    build.check_all_used()
    meta = {"id": str(row["id"])} if "id" in row else {}
    return Record(key, messages, build.readers, family_of(list(build.suffixes)), meta)


def family_of(suffixes: list[str]) -> str:
    """What a conversation with these members teaches, by their kinds alone."""
    kinds = [media_kind(s) for s in suffixes]
    return "video_qa" if "video" in kinds else "vqa" if len(kinds) == 1 else "interleaved" if kinds else "text"


def _names(row: dict, keys: tuple[str, ...]) -> list[str]:
    value: Any = next((row[k] for k in keys if row.get(k)), [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadSample("a media list holds something other than paths")
    return names


class _Builder:
    """Turns texts with marks, or lists of parts, into our parts, and collects the media they use."""

    def __init__(self, find: Find, names: dict[str, list[str]]):
        self.find, self.names, self.used = find, names, dict.fromkeys(names, 0)
        self.readers: dict[str, Any] = {}
        self.suffixes: dict[str, str] = {}  # one per file, in order of first use
        self._known: dict[tuple[str, str], str] = {}

    def message(self, turn: Any) -> dict[str, Any]:
        if isinstance(turn, BadSample):
            raise turn
        if not isinstance(turn, dict):
            raise BadSample("a message lacks role or content")
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        if role is None:
            raise BadSample("a role other than system, user and assistant")
        content = turn.get("content", turn.get("value"))
        parts = self._parts(content)
        if role == "assistant" and any(p["type"] != "text" for p in parts):
            raise BadSample("an assistant turn holds media")
        plain = all(p["type"] == "text" for p in parts)
        return {"role": role, "content": "".join(p["text"] for p in parts) if plain else parts}

    def _parts(self, content: Any) -> list[dict[str, Any]]:
        if isinstance(content, str):
            return [p for piece in MARKS.split(content) if piece for p in [self._piece(piece)]]
        if not isinstance(content, list):
            raise BadSample("content is neither text nor a list of parts")
        return [self._listed(part) for part in content]

    def _piece(self, piece: str) -> dict[str, Any]:
        if not MARKS.fullmatch(piece):
            return {"type": "text", "text": piece}
        kind = piece[1:-1]
        if kind == "audio":
            raise BadSample(NO_AUDIO)
        at = self.used[kind]
        self.used[kind] += 1
        if at >= len(self.names[kind]):
            raise BadSample(f"more <{kind}> marks than {kind}s")
        return self._part(kind, self.names[kind][at])

    def _listed(self, part: Any) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = part.get("text", part.get("value"))
            if not isinstance(text, str):
                raise BadSample("a text part lacks its text")
            return {"type": "text", "text": text}
        if not isinstance(kind, str) or kind.removesuffix("_url") not in LISTS:
            raise BadSample("unknown kind of part")
        if kind.startswith("audio"):
            raise BadSample(NO_AUDIO)
        value = part.get(kind, part.get(kind.removesuffix("_url"), part.get("value", part.get("path"))))
        name = value.get("url") if isinstance(value, dict) else value
        if name is None:  # the file is in the row's own list
            return self._piece(f"<{kind.removesuffix('_url')}>")
        if not isinstance(name, str):
            raise BadSample("a media part lacks its path")
        return self._part(kind.removesuffix("_url"), name.removeprefix("file://"))

    def _part(self, kind: str, name: str) -> dict[str, Any]:
        if (kind, name) not in self._known:
            suffix = suffix_for(len(self.suffixes), name, kind)
            self.readers[suffix] = self.find(name)
            self.suffixes[suffix] = name
            self._known[kind, name] = suffix
        return {"type": kind, kind: self._known[kind, name]}

    def check_all_used(self) -> None:
        for kind in ("image", "video"):
            if self.used[kind] < len(self.names[kind]) and not self._listed_all(kind):
                raise BadSample(f"fewer <{kind}> marks than {kind}s")

    def _listed_all(self, kind: str) -> bool:
        return all((kind, name) in self._known for name in self.names[kind])
