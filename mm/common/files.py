"""Files that are either whole or not there."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.common.errors import UserError

# Full, over quota, longer than allowed, read-only, forbidden: what a person can mend.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def disk_trouble(e: BaseException, where: str | Path = "") -> UserError | None:
    """The UserError that says how to mend a disk that takes nothing more; None for any other error."""
    if not isinstance(e, OSError) or e.errno not in _REFUSED:
        return None
    if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = "choose another folder, or mend its permissions"
    else:
        fix = "free some space or choose another folder"
    return UserError(f"cannot write {where or e.filename or 'to the disk'}: {e.strerror}; {fix}")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` so that `path` holds either the old content or all of the new one.

    Raises:
        UserError: the disk is full or read-only (names the path); the half-written file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        trouble = disk_trouble(e, path)
        raise trouble or UserError(f"cannot write {path}: {e.strerror}; choose another folder") from e


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Parsed JSON. Raises UserError naming the file where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from e


def read_jsonl(path: str | Path) -> list[Any]:
    """Every line parsed. A last line cut short by a kill is dropped; any other broken line is an error."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON: {e}") from e
    return rows


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears under `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
