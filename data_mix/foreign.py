"""What importers share: a record on its way in, and finding the media files that others' data name."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_mix.sample import media_kind
from mm.common.errors import BadSample, UserError

MAX_MEDIA = 2 << 30  # bytes of one picture or clip


@dataclass
class Record:
    """One sample of another format: messages whose media parts name `media` by suffix, each with a way to
    read its bytes."""

    key: str
    messages: list[dict[str, Any]]
    media: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    family: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


Items = Iterator[Record | BadSample]  # a bad one is yielded, not raised: the next may be good


class Place(NamedTuple):
    """A file, or a member of a zip archive (read in place, never extracted)."""

    path: Path
    member: str = ""

    @property
    def name(self) -> str:
        return self.member or str(self.path)


class Media:
    """Finds what a JSON calls 'images/a.jpg' below `root`, never outside: as it is written, else by its name
    where that is unique, in folders and in zip archives."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root} is not a folder; name the folder that holds the media")

    def reader(self, name: str) -> Callable[[], bytes]:
        """A way to the bytes of the file called `name`. Raises BadSample where there is none (now, not later)."""
        return reader(self.find(name))

    def find(self, name: str) -> Place:
        """Raises BadSample: a URL, no such file, or several of that name."""
        if "://" in name:
            raise BadSample("media is a URL; download it first")
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root.resolve()):
                raise BadSample("media path leads out of the media folder (media_root)")
            if path.is_file():
                return Place(path)
        except (OSError, ValueError) as e:
            raise BadSample("media file is missing") from e
        found = self._by_name.get(_base(name), [])
        exact = [p for p in found if p.name.replace("\\", "/").endswith(name.lstrip("./"))]
        found = exact or found
        if len(found) > 1:
            raise BadSample("several media files have this name")
        if not found:
            raise BadSample("media file is missing")
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[Place]]:
        table: dict[str, list[Place]] = {}
        for place in self.all():
            table.setdefault(_base(place.name), []).append(place)
        return table

    def all(self) -> list[Place]:
        """Every picture and clip below the root, in a fixed order."""
        places = []
        for path in sorted(self.root.rglob("*")):
            if path.suffix.lower() == ".zip" and path.is_file():
                places += [Place(path, m) for m in _members(path) if media_kind(m)]
            elif media_kind(path.name) and path.is_file():
                places.append(Place(path))
        return places


def _base(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as z:
            return sorted(z.namelist())
    except (zipfile.BadZipFile, OSError):
        return []


@lru_cache(maxsize=4)
def _archive(path: Path) -> zipfile.ZipFile:
    """Kept open: reading the table of contents anew for each member would take longer than the member."""
    return zipfile.ZipFile(path)


def reader(place: Place) -> Callable[[], bytes]:
    """The bytes at `place`, when they are wanted. Raises BadSample."""

    def read() -> bytes:
        try:
            if not place.member:
                if place.path.stat().st_size > MAX_MEDIA:
                    raise BadSample("media file is larger than 2 GiB")
                return place.path.read_bytes()
            z = _archive(place.path)
            if z.getinfo(place.member).file_size > MAX_MEDIA:
                raise BadSample("media file is larger than 2 GiB")
            return z.read(place.member)
        except (OSError, zipfile.BadZipFile, RuntimeError, KeyError, NotImplementedError, EOFError) as e:
            raise BadSample("media file cannot be read") from e

    return read


def suffix_for(number: int, name: str, kind: str) -> str:
    """Member suffix of the n-th medium, its extension kept where it says what it is."""
    extension = name.rsplit(".", 1)[-1].lower()
    return f"{number}.{extension if media_kind(extension) == kind else {'image': 'jpg', 'video': 'mp4'}[kind]}"


def describe(kind: str, caption: str, suffix: str) -> list[dict[str, Any]]:
    """One exchange that asks for a caption."""
    question = {"image": "Describe this picture.", "video": "Describe this video."}[kind]
    parts = [{"type": kind, kind: suffix}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": caption}]
