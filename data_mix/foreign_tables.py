"""Local `datasets` folders (save_to_disk, or parquet files) and WebDataset tars of others."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from data_mix.foreign import Items, Media, Record, describe
from data_mix.foreign_folder import FIELDS
from data_mix.foreign_json import convert
from data_mix.index import Member, grouped, parse_json, read_member, scan
from data_mix.sample import media_kind
from mm.common.errors import BadSample, UserError

QUESTIONS, ANSWERS = ("question", "query", "prompt"), ("answer", "answers", "response", "multiple_choice_answer")


# ---- datasets


def read_datasets(src: str | Path, *, media_root: str | Path | None = None) -> Items:
    """Records of a folder written by `Dataset.save_to_disk`, or of parquet files.

    Columns: messages or conversations (with images or videos); else an image and a caption, or an image (or
    none), a question and an answer.
    Raises UserError where the folder is neither, or the `datasets` package is missing.
    """
    media = Media(media_root or src if Path(src).is_dir() else Path(src).parent)
    for number, row in enumerate(_rows(Path(src))):
        key = f"row-{number:07d}"
        try:
            yield _table_record(key, row, media)
        except BadSample as e:
            yield BadSample(e.reason, shard=Path(src).name, key=key)


def _rows(src: Path) -> Iterator[dict[str, Any]]:
    files = sorted(src.rglob("*.parquet")) if src.is_dir() else [src] if src.suffix == ".parquet" else []
    if files:
        yield from (row for file in files for row in _parquet(file))
        return
    if not any((src / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise UserError(f"{src} is neither a folder of save_to_disk nor holds .parquet files")
    try:
        from datasets import Dataset, Image, load_from_disk
    except ImportError as e:
        raise UserError("reading a `datasets` folder needs that package: pip install datasets") from e
    loaded = load_from_disk(str(src))
    for part in [loaded] if isinstance(loaded, Dataset) else loaded.values():
        for name, feature in part.features.items():
            if isinstance(feature, Image):  # our own reader decodes, and says what is wrong
                part = part.cast_column(name, Image(decode=False))
        yield from part


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as e:
        raise UserError("reading parquet needs the datasets package: pip install datasets") from e
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except ArrowException as e:
        raise UserError(f"{file} is not a parquet file: {e}") from e


def _table_record(key: str, row: dict[str, Any], media: Media) -> Record:
    pictures = [_bytes(cell, media) for cell in _cells(row, ("images", "image"))]
    if row.get("messages") or row.get("conversations"):
        return _conversation(key, row, pictures, media)
    text = _text(row, ANSWERS) if _text(row, QUESTIONS) else _text(row, FIELDS)
    if not text:
        raise BadSample("no messages, caption or answer column")
    suffixes = [f"{i}.jpg" for i in range(len(pictures))]
    members = dict(zip(suffixes, pictures, strict=True))
    question = _text(row, QUESTIONS)
    if not question:
        if not pictures:
            raise BadSample("no media to pair with the caption")
        return Record(key, describe("image", text, suffixes[0]), members, "caption")
    parts = [{"type": "image", "image": s} for s in suffixes] + [{"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "assistant", "content": text}]
    return Record(key, messages, members, "vqa" if pictures else "text")


def _conversation(key: str, row: dict[str, Any], pictures: list, media: Media) -> Record:
    """The pictures lie in the table itself: the marks are answered from there."""
    inside = {f"{i}.jpg": read for i, read in enumerate(pictures)}

    def find(name: str) -> Callable[[], bytes]:
        return inside[name] if name in inside else media.reader(name)

    clean = _without_nulls({k: v for k, v in row.items() if k not in ("image", "images")})
    return convert(key, {**clean, "images": list(inside)}, find)


def _without_nulls(value: Any) -> Any:
    """Arrow fills the keys that a row does not have with null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _cells(row: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    value: Any = next((row[n] for n in names if row.get(n)), [])
    return value if isinstance(value, list) else [value]


def _bytes(cell: Any, media: Media) -> Callable[[], bytes]:
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return lambda: cell["bytes"]
    if isinstance(cell, bytes):
        return lambda: cell
    path = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(path, str):
        return media.reader(path)
    raise BadSample("an image cell holds no picture")


def _text(row: dict[str, Any], names: tuple[str, ...]) -> str:
    value: Any = next((row[n] for n in names if row.get(n)), "")
    value = value[0] if isinstance(value, list) else value
    return value.strip() if isinstance(value, str) else ""


# ---- WebDataset


def read_webdataset(src: str | Path) -> Items:
    """Records of *.tar: JSON with messages as it is, or one picture or clip with a .txt (or JSON) caption."""
    src = Path(src)
    tars = sorted(src.glob("*.tar")) if src.is_dir() else [src]
    if not tars or not tars[0].is_file():
        raise UserError(f"{src} holds no .tar file; name the folder with the WebDataset shards (not .tar.gz)")
    seen: set[str] = set()
    for tar in tars:
        bad: list[BadSample] = []
        for key, members in grouped(scan(tar, bad)):
            yield from bad
            bad.clear()
            try:
                if key in seen:
                    raise BadSample("duplicate key")
                seen.add(key)
                yield _member_record(key, tar, members)
            except BadSample as e:
                yield BadSample(e.reason, shard=tar.name, key=key)
        yield from bad


def _member_record(key: str, tar: Path, group: list[Member]) -> Record:
    members = {m.suffix: m for m in group}
    if len(members) < len(group):
        raise BadSample("a member comes twice")
    media = {s: _member_reader(tar, m) for s, m in members.items() if media_kind(s)}
    sample = parse_json(_member_reader(tar, members["json"])()) if "json" in members else {}
    if "messages" in sample:
        return Record(key, sample["messages"], media, str(sample.get("family", "")))
    if "txt" in members:
        try:
            sample = {"caption": _member_reader(tar, members["txt"])().decode()}
        except UnicodeDecodeError as e:
            raise BadSample("text is not UTF-8") from e
    caption = _text(sample, FIELDS)
    if not caption or not media:
        _refuse(members)
    suffix = next(iter(media))
    kind = media_kind(suffix) or ""
    family = "caption" if kind == "image" else "video_caption"
    return Record(key, describe(kind, caption, suffix), {suffix: media[suffix]}, family)


def _refuse(members: dict[str, Member]) -> NoReturn:
    raise BadSample("no caption" if "json" in members or "txt" in members else "no JSON for this key")


def _member_reader(tar: Path, member: Member) -> Callable[[], bytes]:
    def read() -> bytes:
        with open(tar, "rb") as f:
            return read_member(f, member)

    return read

