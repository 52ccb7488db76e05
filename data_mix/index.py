"""An index for WebDataset tars that others wrote. Nothing in a tar is trusted, nothing is extracted.

Members with unsafe names, links and devices, samples without (valid) JSON, repeated keys and what follows a
broken header are skipped, counted and named; the rest is used.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_mix.sample import check, media_kind, once
from data_mix.shards import check_key, complete_facts, index_line, index_path, sha256_of, write_source
from mm.common.errors import BadSample, UserError
from mm.common.files import write_atomic
from mm.common.progress import Progress

FactsOf = Callable[[dict, dict[str, bytes]], dict]  # (sample, media) -> the sample with its media's facts
MAX_HEADER = 1 << 20  # bytes of a long name or PAX header; more is an attack or an accident


class Member(NamedTuple):
    key: str
    suffix: str
    offset: int
    size: int


def build_index(
    folder: str | Path, name: str, *, version: str = "1", quiet: bool = True, facts_of: FactsOf = complete_facts
) -> tuple[list[dict], list[BadSample]]:
    """Index every *.tar in `folder` in place: source.json and *.idx.jsonl appear beside the tars.

    Args: facts_of: reads the media's headers; an `Apart` outlives one that hangs or crashes.
    Returns: the shard list of source.json, and what was skipped and why.
    Raises UserError: no tar there, a source.json already there, or no usable sample in any of them.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} holds no .tar file; name the folder with the WebDataset shards (not .tar.gz)")
    if (folder / "source.json").exists():
        raise UserError(f"{folder} already has a source.json; it can be used as it is")
    shards, bad, seen = [], [], set()  # type: ignore[var-annotated]
    with Progress(None, f"indexing {name}", quiet=quiet) as progress:
        for tar in tars:
            lines = []
            for row in read_foreign(tar, bad, facts_of):
                if row.key in seen:
                    bad.append(BadSample("duplicate key", shard=tar.name, key=row.key))
                    continue
                seen.add(row.key)
                lines.append(index_line(row.key, row.members, row.sha1, row.sample))
                progress.update()
            index = "".join(lines).encode()
            write_atomic(index_path(tar), index)
            shards.append({
                "file": tar.name, "samples": len(lines), "bytes": tar.stat().st_size, "sha256": sha256_of(tar),
                "index_sha256": hashlib.sha256(index).hexdigest(),
            })  # fmt: skip
    if not seen:
        raise UserError(f"{folder}: no sample in {len(tars)} tars can be used; first: {bad[0] if bad else 'empty'}")
    write_source(folder, name, version, shards)
    return shards, bad


class ForeignRow(NamedTuple):
    key: str
    members: dict[str, list[int]]
    sha1: dict[str, str]
    sample: dict


def read_foreign(tar: Path, bad: list[BadSample], facts_of: FactsOf = complete_facts) -> Iterator[ForeignRow]:
    """The usable samples of one tar in order; what is not usable goes to `bad` with its name."""
    with open(tar, "rb") as f:
        for key, members in grouped(scan(tar, bad)):
            try:
                yield _row(f, key, members, facts_of)
            except BadSample as e:
                bad.append(BadSample(e.reason, shard=tar.name, key=key))


def scan(tar: Path, bad: list[BadSample]) -> Iterator[Member]:
    """Regular files with safe names, with offsets into the tar."""
    size, last = tar.stat().st_size, ""

    def skip(reason: str, name: str) -> None:
        bad.append(BadSample(reason, shard=tar.name, key=name.encode(errors="replace").decode()))

    try:
        with tarfile.open(tar, "r:", tarinfo=_CalmInfo) as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # a shard may hold millions
                last = info.name
                if info.isdir():
                    continue
                try:
                    member = _member(info)
                except BadSample as e:
                    skip(e.reason, info.name)
                    continue
                if member.offset + member.size > size:
                    skip("the shard ends early", info.name)
                    return
                yield member
    except (tarfile.TarError, OSError, ValueError, EOFError, _HugeHeader) as e:
        what = "the shard ends early" if "end of" in str(e) or "truncated" in str(e) else "broken tar header"
        skip(what, f"after {last}" if last else "")
        return
    if not _ends_well(tar, size):
        skip("the shard ends early", f"after {last}" if last else "")


def _ends_well(tar: Path, size: int) -> bool:
    """A whole tar ends with two blocks of zeros."""
    with open(tar, "rb") as f:
        f.seek(max(size - 1024, 0))
        return size >= 1024 and size % 512 == 0 and not any(f.read(1024))


class _HugeHeader(Exception):
    pass


class _CalmInfo(tarfile.TarInfo):
    """tarfile reads long names and PAX headers into memory at whatever size they claim: not here."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        special = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                   tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        if self.type in special and not 0 <= self.size <= MAX_HEADER:
            raise _HugeHeader
        return super()._proc_member(archive)  # type: ignore[misc]


def _member(info: tarfile.TarInfo) -> Member:
    name = info.name.removeprefix("./")
    try:
        name.encode()
    except UnicodeEncodeError as e:
        raise BadSample("member name is not UTF-8") from e
    if info.issym() or info.islnk():
        raise BadSample("member is a link")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) or info.size < 0:
        raise BadSample("member is not a regular file")
    if name.startswith("/") or ".." in name.split("/"):
        raise BadSample("member name leaves the shard")
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or not suffix:
        raise BadSample("member name has no key and suffix")
    key = f"{folder}/{stem}" if folder else stem
    check_key(key)
    return Member(key, suffix.lower(), info.offset_data, info.size)


def grouped(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Neighbours with one key are one sample, as WebDataset reads them."""
    group: list[Member] = []
    for m in members:
        if group and m.key != group[0].key:
            yield group[0].key, group
            group = []
        group.append(m)
    if group:
        yield group[0].key, group


def read_member(f: BinaryIO, m: Member) -> bytes:
    f.seek(m.offset)
    data = f.read(m.size)
    if len(data) != m.size:
        raise BadSample("the shard ends early")
    return data


def _row(f: BinaryIO, key: str, group: list[Member], facts_of: FactsOf) -> ForeignRow:
    members = {m.suffix: m for m in group}
    if len(members) < len(group):
        raise BadSample("a member comes twice")
    if "json" not in members:
        raise BadSample("no JSON for this key")
    sample = parse_json(read_member(f, members["json"]))
    check(sample, members)
    media = {s: read_member(f, m) for s, m in members.items() if media_kind(s)}
    # facts in a foreign JSON are claims: headers are read again
    sample = facts_of({**sample, "media": {}}, media)
    sha1 = {s: hashlib.sha1(data).hexdigest() for s, data in media.items()}
    return ForeignRow(key, {s: [m.offset, m.size] for s, m in members.items()}, sha1, sample)


def parse_json(raw: bytes) -> dict:
    """Strict: UTF-8, an object, no NaN. Raises BadSample."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=once)
    except UnicodeDecodeError as e:
        raise BadSample("text is not UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise BadSample("broken JSON") from e
    if not isinstance(value, dict):
        raise BadSample("sample is not a JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:  # lone surrogates written as \ud800
        raise BadSample("text is not UTF-8") from e
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
