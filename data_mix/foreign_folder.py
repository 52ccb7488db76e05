"""A plain folder of pictures and clips with captions: .txt beside each, or one table of captions."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_mix.foreign import Items, Media, Place, Record, describe, reader, suffix_for
from data_mix.foreign_json import parse_line
from data_mix.sample import media_kind
from mm.common.errors import BadSample, UserError

FIELDS = ("caption", "captions", "text", "description", "sentence", "sentences", "raw", "title")


def read_folder(src: str | Path, *, captions: str | Path | None = None) -> Items:
    """One record per picture or clip below `src` (zip archives are looked into).

    captions: a .jsonl, .tsv or .csv file whose rows name a file and its caption (one or a list; the first is
    the answer, all are kept in meta); "name" takes the file's own name; None looks for captions*.{jsonl,tsv,csv}
    in the folder and for a .txt beside each file.
    Raises UserError where there is no media, or no caption of any kind.
    """
    media = Media(src)
    places = media.all()
    if not places:
        raise UserError(f"{src} holds no picture or clip")
    tables = _tables(Path(src), captions)
    texts, problems = _captions(tables)
    if not texts and captions is None and not any(_beside(p) for p in places):
        raise UserError(f"{src} has no captions: no .txt beside the media and no captions.jsonl, .tsv or .csv; "
                        "write them, or take the file names with captions=name")  # fmt: skip
    yield from problems
    for number, place in enumerate(places):
        yield _record(number, place, texts, by_name=str(captions) == "name")


def _record(number: int, place: Place, texts: dict[str, list[str]], *, by_name: bool) -> Record | BadSample:
    base = place.name.replace("\\", "/").rsplit("/", 1)[-1]
    stem = base.rsplit(".", 1)[0]
    key = f"{number:07d}-{re.sub(r'[^a-zA-Z0-9_-]', '_', stem)[:80]}"
    try:
        found = [re.sub(r"[_\W]+", " ", stem).strip()] if by_name else texts.get(base) or _beside(place)
    except BadSample as e:
        return BadSample(e.reason, shard=place.path.name, key=base)
    if not found or not found[0].strip():
        return BadSample("no caption", shard=place.path.name, key=base)
    kind = media_kind(base) or ""
    suffix = suffix_for(0, base, kind)
    family = "caption" if kind == "image" else "video_caption"
    meta: dict[str, Any] = {"file": base} | ({"captions": found} if len(found) > 1 else {})
    return Record(key, describe(kind, found[0].strip(), suffix), {suffix: reader(place)}, family, meta)


def _beside(place: Place) -> list[str]:
    path = place.path.with_suffix(".txt")
    if place.member or not path.is_file():
        return []
    try:
        return [path.read_text(encoding="utf-8").strip()]
    except UnicodeDecodeError as e:
        raise BadSample("text is not UTF-8") from e


def _tables(src: Path, captions: str | Path | None) -> list[Path]:
    if captions is None:
        return sorted(p for p in src.glob("captions*") if p.suffix in (".jsonl", ".tsv", ".csv"))
    if str(captions) == "name":
        return []
    if not Path(captions).is_file():
        raise UserError(f"{captions} is not a file of captions; give a .jsonl, .tsv or .csv file, or 'name'")
    return [Path(captions)]


def _captions(tables: list[Path]) -> tuple[dict[str, list[str]], list[BadSample]]:
    """File name -> captions, and the rows that give none."""
    texts: dict[str, list[str]] = {}
    problems = []
    for table in tables:
        for number, row in enumerate(_rows(table), start=1):
            try:
                names, found = _row(row)
                for name in names:
                    texts.setdefault(name, []).extend(found)
            except BadSample as e:
                problems.append(BadSample(e.reason, shard=table.name, key=f"row {number}"))
    return texts, problems


def _rows(table: Path) -> Iterator[Any]:
    raw = table.read_bytes()
    if table.suffix == ".jsonl":
        yield from (parse_line(line) for line in raw.split(b"\n") if line.strip())
        return
    text = io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline="")
    rows = list(csv.reader(text, delimiter="\t" if table.suffix == ".tsv" else ","))
    if not rows:
        return
    header = [cell.strip().lower() for cell in rows[0]]
    if any(f in header for f in FIELDS):
        yield from (dict(zip(header, row, strict=False)) for row in rows[1:] if row)
    else:  # no header: file, caption
        yield from ({"file": row[0], "caption": row[1] if len(row) > 1 else ""} for row in rows if row)


def _row(row: Any) -> tuple[set[str], list[str]]:
    """Every file that the row names, and its captions."""
    if isinstance(row, BadSample):
        raise row
    if not isinstance(row, dict):
        raise BadSample("row is not an object")
    value = next((row[f] for f in FIELDS if row.get(f)), None)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(t, str) for t in found):
        raise BadSample("row has no caption")
    if any("\ufffd" in t for t in found):
        raise BadSample("text is not UTF-8")
    names = {v for k, v in row.items() if isinstance(v, str) and k not in FIELDS and media_kind(v)}
    if not names:
        raise BadSample("row names no picture or clip")
    return {name.replace("\\", "/").rsplit("/", 1)[-1] for name in names}, found
