"""Token and visual-token counts of every sample, from metadata alone, cached beside the index.

One file per shard and (processor, tokenizer, kind): `shard-00000.counts-<hash>.npy`, int32 [samples, 2].
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_mix.media_plan import first_media, only_media, pair_ids, part_grid, shown
from data_mix.regions import named_regions, phrase_ids, regions_of
from data_mix.sample import media_parts, suffix_of
from data_mix.shards import Source
from mm.common.errors import BadSample, UserError
from mm.common.files import write_atomic
from mm.common.progress import Progress
from mm.processor import Processor
from mm.prompt import sample_tokens
from mm.tokenizer import Tokenizer

BAD = -1
CODE_VERSION = 4  # part of the hash: raise it when the same data gives other counts than before


@dataclass
class Counts:
    """Per sample of one source: int32 [n] tokens and merged visual tokens, -1 where `reasons` says why not."""

    tokens: np.ndarray
    visual: np.ndarray
    reasons: dict[int, str]


def sample_counter(
    processor: Processor, tokenizer: Tokenizer, kind: str, max_text: int
) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """A function sample -> (tokens, merged visual tokens); it raises BadSample."""

    def packs(sample: dict[str, Any]) -> tuple[int, int]:
        if sample.get("told"):
            raise BadSample("its pictures are told and not shown")
        return sample_tokens(sample, processor, tokenizer)

    def told(sample: dict[str, Any]) -> tuple[int, int]:
        if {suffix_of(p) for p in media_parts(sample["messages"])} - sample.get("told", {}).keys():
            raise BadSample("its pictures are shown and not told")
        for said in sample.get("told", {}).values():
            regions_of(said)
        return sample_tokens(sample, processor, tokenizer)

    def pairs(sample: dict[str, Any]) -> tuple[int, int]:
        visual = processor.tokens(part_grid(first_media(sample), sample, processor))
        return len(pair_ids(sample, tokenizer, max_text)), visual

    def regions(sample: dict[str, Any]) -> tuple[int, int]:
        part = only_media(sample)
        grid, plan = part_grid(part, sample, processor), shown(part, sample, processor)
        named = [(len(phrase_ids(r.phrase, tokenizer, max_text)), len(r.frames(plan))) for r in named_regions(sample)]
        if not sum(frames for _, frames in named):
            raise BadSample("no frame shown of this clip is within the times of its named regions")
        return sum(length * frames for length, frames in named), processor.tokens(grid)

    return {"packs": packs, "told": told, "pairs": pairs, "regions": regions}[kind]


def count_source(
    source: Source, processor: Processor, tokenizer: Tokenizer, *, kind: str = "packs", max_text: int = 64,
    quiet: bool = True,
) -> Counts:  # fmt: skip
    """Counts of every sample, from the cache where it is there; the cache is written where it can be."""
    count = sample_counter(processor, tokenizer, kind, max_text)
    facts = [CODE_VERSION, processor.hash, tokenizer.hash, kind, max_text if kind != "packs" else 0]
    parts, reasons, start = [], {}, 0  # type: ignore[var-annotated]
    with Progress(len(source), f"counting tokens of {source.name}", quiet=quiet) as progress:
        for shard in source.shards:
            digest = hashlib.sha256(json.dumps([*facts, shard["index_sha256"]]).encode()).hexdigest()[:12]
            path = (source.folder / shard["file"]).with_suffix(f".counts-{digest}.npy")
            rows = _load(path, shard["samples"])
            if rows is None:
                rows = np.empty((shard["samples"], 2), np.int32)
                for i in range(len(rows)):
                    rows[i], _ = _count(source, start + i, count)
                    progress.update()
                _save(path, rows)
            for i in map(int, np.flatnonzero(rows[:, 0] == BAD)):
                reasons[start + i] = _count(source, start + i, count)[1]
            parts.append(rows)
            start += len(rows)
    table = np.concatenate([np.empty((0, 2), np.int32), *parts])
    return Counts(table[:, 0], table[:, 1], reasons)


def _count(source: Source, i: int, count: Callable) -> tuple[tuple[int, int], str]:
    try:
        return count(source.sample(i)), ""
    except BadSample as e:
        return (BAD, BAD), e.reason


def _load(path: Path, n: int) -> np.ndarray | None:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.shape == (n, 2) and rows.dtype == np.int32 else None


def _save(path: Path, rows: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    with contextlib.suppress(UserError):  # a read-only folder or a full disk: count again next time
        write_atomic(path, buffer.getvalue())
