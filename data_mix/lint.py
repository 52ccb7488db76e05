"""Every sample opened and checked before a run meets it."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_mix.decode import Apart
from data_mix.importers import with_facts
from data_mix.index import FactsOf, parse_json, read_foreign
from data_mix.sample import check, media_kind, media_parts, suffix_of
from data_mix.shards import Source
from data_mix.stats import source_folders
from mm.common.errors import BadSample, UserError
from mm.common.progress import Progress


@dataclass
class LintReport:
    """What was looked at, and each thing that is wrong with the shard and key it was found under."""

    folder: Path
    sources: int = 0
    samples: int = 0
    bad: list[BadSample] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # whole sources that cannot be opened

    @property
    def exit_code(self) -> int:
        return 1 if self.bad or self.broken else 0

    def reasons(self) -> dict[str, int]:
        return dict(Counter(b.reason for b in self.bad).most_common())

    def __str__(self) -> str:
        what = f"{self.samples} samples looked at, {len(self.bad) or 'no'} bad"
        lines = [f"{self.folder}: {self.sources} sources, {what}", *self.broken]
        for reason, n in self.reasons().items():
            named = [f"{b.shard}/{b.key}" for b in self.bad if b.reason == reason]
            lines.append(f"  {n} x {reason}: {', '.join(named[:5])}{', ...' if n > 5 else ''}")
        return "\n".join(lines)


def lint(folder: str | Path, *, decode: bool = False, quiet: bool = False) -> LintReport:
    """Check a source folder, a folder of source folders, or a folder of foreign WebDataset tars.

    Looked at: the shards' hashes, each sample's JSON (in the tar and in the index), roles and parts, that
    every part has its media and every medium its part, that media headers can be read and agree with the
    facts on record; with `decode` also that frames can be decoded.
    Raises UserError where `folder` is none of these.
    """
    report = LintReport(Path(folder))
    with Progress(None, f"checking {report.folder.name}", quiet=quiet) as progress, \
            contextlib.closing(Apart(with_facts)) as apart:  # fmt: skip
        facts_of: FactsOf = lambda sample, media: apart(sample, media, decode)
        for found, source in _sources(report, facts_of):
            report.sources += 1
            if isinstance(found, BadSample):
                report.broken.append(str(found.reason))
                continue
            for i in range(len(found)):
                report.samples += 1
                try:
                    check_sample(found, i, facts_of)
                except BadSample as e:
                    shard = f"{source}{found.shard_of(i)}"
                    report.bad.append(BadSample(e.reason, shard=shard, key=found.row(i)["key"]))
                progress.update(note=f"{len(report.bad)} bad" if report.bad else "")
    return report


def _sources(report: LintReport, facts_of: FactsOf) -> Iterator[tuple[Any, str]]:
    """Every source below the folder (or why it cannot be opened) and the name to put before its shards."""
    folder = report.folder
    if (folder / "source.json").is_file():
        yield _open(folder), ""
        return
    tars = sorted(folder.glob("*.tar"))
    if tars:
        report.sources += 1
        seen: set[str] = set()
        for tar in tars:
            for row in read_foreign(tar, report.bad, facts_of):
                report.samples += 1
                if row.key in seen:
                    report.bad.append(BadSample("duplicate key", shard=tar.name, key=row.key))
                seen.add(row.key)
        return
    for path in source_folders(folder):
        yield _open(path), f"{path.name}/"


def _open(folder: Path) -> Source | BadSample:
    try:
        return Source(folder, deep=True)
    except UserError as e:
        return BadSample(str(e))


def check_sample(source: Source, i: int, facts_of: FactsOf) -> None:
    """Raise BadSample unless everything about sample i holds."""
    row = source.row(i)
    sample, members = row["sample"], row["members"]
    check(sample, members)
    if parse_json(source.member(i, "json")).get("messages") != sample["messages"]:
        raise BadSample("the JSON in the tar is not the one in the index")
    media = {s: source.member(i, s) for s in members if media_kind(s)}
    if media.keys() - {suffix_of(p) for p in media_parts(sample["messages"])}:
        raise BadSample("media that no part names")
    for suffix, data in media.items():
        if hashlib.sha1(data).hexdigest() != row["sha1"].get(suffix):
            raise BadSample("the media's bytes have changed since they were indexed")
    if media and facts_of({"media": {}}, media)["media"] != sample.get("media", {}):
        raise BadSample("the media facts on record are not those of the file")
