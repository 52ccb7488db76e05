"""Sources on disk: WebDataset tar shards with a byte index beside them.

    source.json           {"name", "version", "shards": [{file, samples, bytes, sha256, index_sha256}], "fingerprint"}
    shard-00000.tar       plain tar: KEY.json and its media KEY.mp4, KEY.0.jpg, ... side by side
    shard-00000.idx.jsonl per sample {"key", "members": {suffix: [offset, size]}, "sha1": {...}, "sample": {...}}

Reading goes by offset alone: tar headers are never trusted and nothing is ever extracted.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_mix.sample import check, media_kind
from mm.common.errors import BadSample, UserError
from mm.common.files import atomic_folder, read_json, write_atomic, write_json

KEY = re.compile(r"[^./\s\x00-\x1f\x7f][^.\s\x00-\x1f\x7f]*")
SUFFIX = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
VERIFIED = ".verified.json"


class Location(NamedTuple):
    """Where a member's bytes lie, and their SHA-1: all that a decode worker needs."""

    path: str
    offset: int
    size: int
    sha1: str


def check_key(key: str) -> None:
    """WebDataset cuts a member's name at its first dot: such keys, and unsafe ones, are a BadSample."""
    if not KEY.fullmatch(key) or key.startswith("__") or any(p in ("", "..") for p in key.split("/")):
        raise BadSample("key is empty or has dots, spaces or odd slashes", key=key)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx.jsonl")


def fingerprint_of(shards: list[dict]) -> str:
    text = "\n".join(f"{s['sha256']} {s['index_sha256']}" for s in shards)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def media_facts(suffix: str, data: bytes) -> dict[str, Any] | None:
    """Width, height and (for video) frames, fps, seconds from the header alone; None for other members.

    Raises BadSample where the header cannot be read.
    """
    from vision.media import image_size, video_info  # heavy: planning from an index never needs it

    kind = media_kind(suffix)
    if kind == "image":
        width, height = image_size(data)
        return {"kind": "image", "width": width, "height": height}
    if kind == "video":
        v = video_info(data)
        return {
            "kind": "video", "width": v.width, "height": v.height, "frames": v.frames, "fps": v.fps,
            "seconds": v.seconds, "rotation": v.rotation, "audio": v.audio,
        }  # fmt: skip
    return None


def complete_facts(sample: dict, media: dict[str, bytes]) -> dict:
    """`sample` with "media" facts for every image and video in `media` (given facts are kept)."""
    facts = dict(sample.get("media") or {})
    for suffix, data in media.items():
        if suffix not in facts and (found := media_facts(suffix, data)):
            facts[suffix] = found
    return {**sample, "media": facts}


def index_line(key: str, members: dict[str, list[int]], sha1: dict[str, str], sample: dict) -> str:
    row = {"key": key, "members": members, "sha1": sha1, "sample": sample}
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


class ShardWriter:
    """Write a source folder, equal bytes for equal input. The folder appears when the block ends well.

        with ShardWriter(folder, "caption") as w:
            w.write("clip-000001", {"messages": [...], "family": "caption"}, {"mp4": data})

    Raises:
        UserError: the folder already holds something, a key comes twice, or the disk is full.
        BadSample (from `write`): bad key, messages or media; nothing was written, go on with the next.
    """

    def __init__(
        self, folder: str | Path, name: str, *, version: str = "1", max_samples: int = 500,
        max_bytes: int = 512 << 20,
    ):  # fmt: skip
        self.folder, self.name, self.version = Path(folder), name, version
        self.max_samples, self.max_bytes = max_samples, max_bytes
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} is not empty; remove it or choose another folder for {name!r}")
        self._shards: list[dict] = []
        self._keys: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._tar: Any = None

    def __enter__(self) -> "ShardWriter":
        self._at = self._stack.enter_context(atomic_folder(self.folder))
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._finish_shard()
                self._write_source()
        except BaseException as e:
            self._stack.__exit__(type(e), e, e.__traceback__)
            raise
        finally:
            if self._tar:
                self._tar.close()
        self._stack.__exit__(*error)

    def __len__(self) -> int:
        return len(self._keys)

    def write(self, key: str, sample: dict, media: dict[str, bytes]) -> None:
        """Append one sample; `media` maps member suffixes ("mp4", "0.jpg", lower case) to file bytes."""
        check_key(key)
        if key in self._keys:
            raise UserError(f"{self.name}: key {key!r} was written before; keys are unique in a source")
        for suffix in media:
            if not SUFFIX.fullmatch(suffix) or suffix == "json":
                raise UserError(f"{self.name}/{key}: member suffix {suffix!r} must be like mp4 or 0.jpg")
        check(sample, media)
        sample = complete_facts(sample, media)
        try:
            raw = json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError as e:
            raise BadSample("text is not UTF-8", key=key) from e
        try:
            self._append(key, sample, {"json": raw, **media})
        except OSError as e:
            raise UserError(f"cannot write {self.folder}: {e.strerror}; free some space") from e

    def _append(self, key: str, sample: dict, files: dict[str, bytes]) -> None:
        if self._tar is None:
            self._start_shard()
        members, sha1 = {}, {}
        for suffix, data in files.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode = len(data), 0o644
            self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))
            members[suffix] = [self._size, len(data)]
            self._put(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
            if suffix != "json":
                sha1[suffix] = hashlib.sha1(data).hexdigest()
        self._lines.append(index_line(key, members, sha1, sample))
        self._keys.add(key)
        if len(self._lines) >= self.max_samples or self._size >= self.max_bytes:
            self._finish_shard()

    def _start_shard(self) -> None:
        self._file = f"shard-{len(self._shards):05d}.tar"
        self._tar = open(self._at / self._file, "wb")  # noqa: SIM115 (closed with the shard)
        self._hash, self._size, self._lines = hashlib.sha256(), 0, []  # type: ignore[var-annotated]

    def _put(self, data: bytes) -> None:
        self._tar.write(data)
        self._hash.update(data)
        self._size += len(data)

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._put(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._tar.close()
        self._tar = None
        index = "".join(self._lines).encode()
        write_atomic(index_path(self._at / self._file), index)
        self._shards.append({
            "file": self._file, "samples": len(self._lines), "bytes": self._size,
            "sha256": self._hash.hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest(),
        })  # fmt: skip

    def _write_source(self) -> None:
        write_source(self._at, self.name, self.version, self._shards)


def write_source(folder: Path, name: str, version: str, shards: list[dict]) -> None:
    write_json(folder / "source.json", {
        "name": name, "version": version, "shards": shards, "fingerprint": fingerprint_of(shards),
    })  # fmt: skip
    _stamp(folder, shards)


class Source:
    """A source folder, opened for random access by sample number; safe to share between threads.

    Raises UserError where the folder is no source or a shard is not the one that was indexed.
    `deep` hashes every shard again; else a shard is hashed only if its size or time has changed
    since it was last found good.
    """

    def __init__(self, folder: str | Path, *, deep: bool = False):
        self.folder = Path(folder)
        if not (self.folder / "source.json").is_file():
            raise UserError(
                f"{folder} holds no source.json; import it with `mm data import` or index its tars with "
                "`mm data import webdataset`"
            )
        facts = read_json(self.folder / "source.json")
        try:
            self.name, self.version, self.shards = facts["name"], facts["version"], facts["shards"]
            self.fingerprint: str = facts["fingerprint"]
            _verify(self.folder, self.shards, self.fingerprint, deep)
        except (KeyError, TypeError) as e:
            raise UserError(f"{folder}/source.json lacks {e}; import the data again") from e
        self._open_indexes()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def _open_indexes(self) -> None:
        self._maps = [_map(index_path(self.folder / s["file"])) for s in self.shards]
        lines = [_line_bounds(m) for m in self._maps]
        for s, bounds in zip(self.shards, lines, strict=True):
            if len(bounds) - 1 != s["samples"]:
                raise UserError(f"{self.folder}/{s['file']}: the index has {len(bounds) - 1} samples, "
                                f"source.json says {s['samples']}; import the data again")  # fmt: skip
        self._lines = lines
        self._last: tuple[int, dict[str, Any]] = (-1, {})
        self._paths = [str(self.folder / s["file"]) for s in self.shards]
        self._starts = np.cumsum([0, *(s["samples"] for s in self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {len(self)} samples, {self.fingerprint})"

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.name}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def row(self, i: int) -> dict[str, Any]:
        """The whole index row of sample i: key, members, sha1, sample. Not to be changed: the last is kept."""
        number, row = self._last
        if number != i:
            shard, line = self._find(i)
            a, b = self._lines[shard][line], self._lines[shard][line + 1]
            row = json.loads(self._maps[shard][a:b])
            self._last = (i, row)
        return row

    def sample(self, i: int) -> dict[str, Any]:
        """The sample's JSON, from the index: no tar is opened."""
        return self.row(i)["sample"]

    def rows(self) -> Iterator[dict[str, Any]]:
        return (self.row(i) for i in range(len(self)))

    @cached_property
    def keys(self) -> list[str]:
        return [row["key"] for row in self.rows()]

    def shard_of(self, i: int) -> str:
        return self.shards[self._find(i)[0]]["file"]

    def locate(self, i: int, suffix: str) -> Location:
        """Where the bytes of one member lie. Raises BadSample when the sample has no such member."""
        row, shard = self.row(i), self._find(i)[0]
        if suffix not in row["members"]:
            file = self.shards[shard]["file"]
            raise BadSample("a part names media that is not in the shard", shard=file, key=row["key"])
        offset, size = row["members"][suffix]
        return Location(self._paths[shard], offset, size, row["sha1"].get(suffix, ""))

    def member(self, i: int, suffix: str) -> bytes:
        """The bytes of one member. Raises BadSample when it is not there or the shard ends early."""
        _, offset, size, _ = self.locate(i, suffix)
        with self._lock:
            data = os.pread(self._descriptor(self._find(i)[0]), size, offset)
        if len(data) != size:
            raise BadSample("the shard ends early", shard=self.shard_of(i), key=self.row(i)["key"])
        return data

    def _descriptor(self, shard: int) -> int:
        """At most 32 shards stay open."""
        if shard not in self._files:
            if len(self._files) >= 32:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.folder / self.shards[shard]["file"], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()


def read_at(location: Location) -> bytes:
    """The bytes at `location`, for a worker that has no Source. Raises BadSample if they are not all there."""
    try:
        with open(location.path, "rb") as f:
            data = os.pread(f.fileno(), location.size, location.offset)
    except OSError as e:
        raise BadSample(f"cannot read the shard: {e.strerror}") from e
    if len(data) != location.size:
        raise BadSample("the shard ends early")
    return data


def _map(path: Path) -> Any:
    with open(path, "rb") as f:
        empty = os.fstat(f.fileno()).st_size == 0
        return b"" if empty else mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _line_bounds(data: Any) -> np.ndarray:
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    return np.concatenate([[0], ends])


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _stat(folder: Path, shard: dict) -> list:
    s = (folder / shard["file"]).stat()
    return [s.st_size, s.st_mtime_ns, shard["sha256"]]


def _stamp(folder: Path, shards: list[dict]) -> None:
    """Remember which files were found good, where the folder can be written."""
    stats = {s["file"]: _stat(folder, s) for s in shards}
    with contextlib.suppress(UserError, OSError):
        write_json(folder / VERIFIED, stats)


def _verify(folder: Path, shards: list[dict], fingerprint: str, deep: bool) -> None:
    """Every shard is byte for byte the one that was indexed, or UserError."""

    def refuse(what: str) -> UserError:
        return UserError(f"{folder}: {what}, so this is not the data with fingerprint {fingerprint}; "
                         "restore it, or import it again under a new folder")  # fmt: skip

    if fingerprint_of(shards) != fingerprint:
        raise refuse("source.json does not match its own shard list")
    try:
        known = {} if deep else read_json(folder / VERIFIED)
    except UserError:
        known = {}
    stale = False
    for s in shards:
        path = folder / s["file"]
        if Path(s["file"]).name != s["file"] or not path.is_file() or not index_path(path).is_file():
            raise refuse(f"{s['file']} or its index is missing")
        if path.stat().st_size != s["bytes"]:
            raise refuse(f"{s['file']} has {path.stat().st_size} bytes, not {s['bytes']}")
        if sha256_of(index_path(path)) != s["index_sha256"]:
            raise refuse(f"the index of {s['file']} has changed")
        if known.get(s["file"]) != _stat(folder, s):
            stale = True
            if sha256_of(path) != s["sha256"]:
                raise refuse(f"the content of {s['file']} has changed")
    if stale:
        _stamp(folder, shards)
