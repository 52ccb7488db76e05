"""Other people's data -> a source folder. What cannot be used is skipped, counted and named."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_mix.decode import Apart
from data_mix.foreign import Items, Record
from data_mix.foreign_folder import read_folder
from data_mix.foreign_json import read_llava
from data_mix.foreign_tables import read_datasets, read_webdataset
from data_mix.index import build_index
from data_mix.sample import media_kind
from data_mix.shards import ShardWriter, Source, complete_facts
from mm.common.config import nearest
from mm.common.errors import BadSample, UserError
from mm.common.files import write_json
from mm.common.progress import Progress
from vision.media import read_frames, read_image

READERS = {"llava": read_llava, "folder": read_folder, "datasets": read_datasets, "webdataset": read_webdataset}


@dataclass
class ImportReport:
    """What became of each sample. `skipped`: one BadSample each, with the file and key it was found under."""

    folder: Path
    samples: int = 0
    families: Counter[str] = field(default_factory=Counter)
    skipped: list[BadSample] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        return dict(Counter(b.reason for b in self.skipped).most_common())

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.samples} samples (" +
                 (", ".join(f"{n} {f}" for f, n in self.families.most_common()) or "none") + ")"]  # fmt: skip
        for reason, n in self.reasons().items():
            names = [f"{b.shard}/{b.key}" for b in self.skipped if b.reason == reason][:3]
            lines.append(f"  skipped {n} x {reason}: {', '.join(names)}{', ...' if n > 3 else ''}")
        return "\n".join(lines)


def import_data(
    kind: str, src: str | Path, out: str | Path, *, name: str | None = None, captions: str | Path | None = None,
    media_root: str | Path | None = None, check: bool = True, quiet: bool = False,
) -> ImportReport:  # fmt: skip
    """Import `src` of `kind` llava, folder, datasets or webdataset into the source folder `out`.

    A webdataset whose `out` is `src` itself is indexed in place: the tars stay as they are, and samples need JSON
    with messages.

    Args:
        name: the source's name, by default that of `out`.
        captions: for kind folder: a table of captions, or "name" for the files' own names.
        media_root: for kinds llava and datasets: the folder below which the media lie.
        check: decode each picture, and three frames of each clip, so that damaged ones are found now.
    The skipped samples are also written to `out`/skipped.json.
    Raises UserError: unknown kind, nothing there, `out` not empty, disk full, or no usable sample.
    """
    if kind not in READERS:
        raise UserError(f"kind {kind!r} is not known{nearest(kind, READERS)}")
    if not Path(src).exists():
        raise UserError(f"{src} does not exist")
    out = Path(out)
    report = ImportReport(out)
    if kind == "webdataset" and out.is_dir() and out.samefile(src):
        with contextlib.closing(Apart(with_facts)) as facts_of:
            _, report.skipped = build_index(
                out, name or out.name, quiet=quiet, facts_of=lambda sample, media: facts_of(sample, media, check)
            )
        report.families = Counter(str(r["sample"].get("family") or "unnamed") for r in Source(out).rows())
        report.samples = report.families.total()
    else:
        _copy(report, kind, Path(src), name or out.name, _items(kind, src, captions, media_root), check, quiet)
    skipped = [{"file": b.shard, "key": b.key, "reason": b.reason} for b in report.skipped]
    write_json(out / "skipped.json", skipped)
    return report


def _copy(
    report: ImportReport, kind: str, src: Path, name: str, items: Items, check: bool, quiet: bool
) -> None:
    """Write every good item to a new source folder. Raises UserError where there is none."""
    with ShardWriter(report.folder, name) as writer, Progress(None, f"importing {kind}", quiet=quiet) as progress, \
            contextlib.closing(Apart(with_facts)) as facts_of:  # fmt: skip
        for item in items:
            try:
                _write(writer, item, report, check, facts_of)
            except BadSample as e:
                shard = item.shard if isinstance(item, BadSample) else src.name
                report.skipped.append(BadSample(e.reason, shard=shard, key=item.key or e.key))
            progress.update(note=f"{len(report.skipped)} skipped" if report.skipped else "")
        if not report.samples:
            raise UserError(f"{src}: no sample can be used; {report}")


def _items(kind: str, src: str | Path, captions: Any, media_root: Any) -> Items:
    given = {k: v for k, v in (("captions", captions), ("media_root", media_root)) if v is not None}
    takes = {"folder": {"captions"}, "llava": {"media_root"}, "datasets": {"media_root"}}.get(kind, set())
    for option in given.keys() - takes:
        raise UserError(f"kind {kind} takes no {option}")
    return READERS[kind](src, **given)  # type: ignore[operator]


def _write(
    writer: ShardWriter, item: Record | BadSample, report: ImportReport, check: bool, facts_of: Apart
) -> None:
    if isinstance(item, BadSample):
        raise item
    media = {suffix: read() for suffix, read in item.media.items()}
    sample = facts_of({"messages": item.messages, "media": {}}, media, check)
    extra = {"family": item.family} if item.family else {}
    writer.write(item.key, {**sample, **extra, **({"meta": item.meta} if item.meta else {})}, media)
    report.samples += 1
    report.families[item.family or "unnamed"] += 1


def with_facts(sample: dict[str, Any], media: dict[str, bytes], check: bool) -> dict[str, Any]:
    """The sample with the facts of its media, each of which is decoded if `check`. Raises BadSample."""
    sample = complete_facts(sample, media)
    for suffix, data in media.items() if check else ():
        probe(suffix, data, sample["media"].get(suffix))
    return sample


def probe(suffix: str, data: bytes, facts: dict[str, Any] | None) -> None:
    """Decode a picture, or the first, middle and last frame of a clip. Raises BadSample."""
    if media_kind(suffix) == "image":
        read_image(data)
    elif facts:
        last = facts["frames"] - 1
        read_frames(data, np.unique([0, last // 2, last]))
