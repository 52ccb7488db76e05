"""`responses.jsonl`: everything a score is made of, one line per answer, only ever appended.

The first line is `{"run": {...}}` (what was asked of which checkpoint). Every other line is one row:

    task, id, type, split    which item
    variant                  "model", "blind", "majority" or "probe": who answered
    prompt, media, response, parsed, answer, choices, score
    chance, ceiling, space   what a guess is worth, what an oracle gets, "open" or "closed" answers
    verdict_by               "rule" or the judge's name
    skipped                  instead of a response: why this item could not be asked

or `{"session": {"seconds", "answers"}}`, one per call. Where a key comes twice the later row holds.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mm.common import dist
from mm.common.errors import UserError
from mm.common.files import read_jsonl

NAME = "responses.jsonl"
Key = tuple[str, str, str]


def key(row: dict) -> Key:
    return row["task"], row["id"], row["variant"]


def read(folder: str | Path) -> tuple[dict, list[dict]]:
    """(run, rows) of a run folder; of rows with one key the last. Raises UserError where there is none."""
    path = Path(folder) / NAME
    if not path.exists():
        raise UserError(f"{folder} holds no {NAME}; run `mm eval` into it first")
    return split_rows(read_jsonl(path))


def split_rows(lines: Iterable[dict]) -> tuple[dict, list[dict]]:
    run: dict[str, Any] = {}
    rows: dict[Key, dict] = {}
    for line in lines:
        if "run" in line:
            run = {**line["run"], **{k: v for k, v in run.items() if k == "seconds"}}
        elif "session" in line:
            run["seconds"] = round(run.get("seconds", 0.0) + line["session"]["seconds"], 2)
        else:
            rows[key(line)] = line
    return run, list(rows.values())


class ResponseLog:
    """Appends rows; every batch is on disk before the next is asked. One file per rank, merged by rank 0."""

    def __init__(self, folder: str | Path, run: dict):
        self.folder, self.fresh = Path(folder), 0
        self.file: TextIO | None = None
        self.path = self.folder / (NAME if dist.world_size() == 1 else f"responses.rank{dist.rank()}.jsonl")
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.merge()
            self._begin(run)
        dist.barrier()
        self.run, rows = read(self.folder)
        self.rows: dict[Key, dict] = {key(r): r for r in rows}

    def _begin(self, run: dict) -> None:
        path = self.folder / NAME
        old = read(self.folder)[0] if path.exists() else {}
        for name in ("checkpoint_fingerprint", "data_fingerprint"):
            if old and old.get(name) != run.get(name):
                raise UserError(
                    f"{path} holds answers of another {name.split('_')[0]} ({old.get(name)}, now {run.get(name)}); "
                    f"choose another --out, or delete the file to begin anew"
                )
        if old != {**old, **run}:
            _append(path, [{"run": run}])

    def merge(self) -> None:
        """Bring what ranks wrote (also a killed run's) into the one file; then the ranks' files go."""
        for part in sorted(self.folder.glob("responses.rank*.jsonl")):
            _append(self.folder / NAME, read_jsonl(part))
            part.unlink()

    def add(self, rows: list[dict]) -> None:
        """Append rows and flush."""
        if self.file is None:
            trim(self.path)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - close() does
        self.file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        self.file.flush()
        self.fresh += sum("task" in r for r in rows)
        self.rows.update({key(r): r for r in rows if "task" in r})

    def gather(self) -> None:
        """After this every rank's rows are in the one file and in `rows` of all; rank 0 writes on there."""
        self.close()
        dist.barrier()
        if dist.is_main():
            self.merge()
            self.path = self.folder / NAME
        dist.barrier()
        if dist.world_size() > 1:
            self.rows = {key(r): r for r in read(self.folder)[1]}

    def answered(self, k: Key) -> bool:
        """A skipped item is asked again: its file may have been mended."""
        row = self.rows.get(k)
        return row is not None and "skipped" not in row

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> "ResponseLog":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _append(path: Path, rows: list[dict]) -> None:
    if path.exists():
        trim(path)
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def trim(path: Path) -> None:
    """Cut a last line that a kill left half written."""
    if not path.exists():
        return
    with open(path, "rb+") as f:
        data = f.read()
        if data and not data.endswith(b"\n"):
            f.truncate(data.rfind(b"\n") + 1)
