"""Decoded and resized frames on disk, so that every epoch after the first reads instead of decoding.

One .npy file of uint8 [T, H, W, 3] per media and processor, named after both hashes; written under a
temporary name and moved into place, so that readers of any process see all of it or nothing.
"""

import errno
import itertools
import math
import mmap
import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np

_numbers = itertools.count()
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d+), (\d+), (\d+), 3\), \} *\n",
    re.DOTALL,
)


def _frames(data: mmap.mmap) -> np.ndarray | None:
    """uint8 [T, H, W, 3] of a whole .npy file; None for anything else. (np.load takes longer than the rest of
    making an example.)"""
    header = _HEADER.match(data[:256])
    if header is None:
        return None
    shape = (*(int(n) for n in header.groups()[1:]), 3)
    start = 10 + int.from_bytes(header[1], "little")
    if len(data) != start + math.prod(shape):
        return None
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


class FrameCache:
    """A folder of frames, at most `max_bytes` large: the oldest files go first. Many processes may share it.

    When the disk is full, nothing more is written and the run goes on; this is said once, on stderr.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = 20 << 30):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.error: OSError | None = None  # why nothing is written any more
        self._written, self._lock = max_bytes, threading.Lock()  # the first write looks at what is there

    def path(self, sha1: str, processor_hash: str) -> Path:
        return Path(self._file(sha1, processor_hash))

    def _file(self, sha1: str, processor_hash: str) -> str:
        return f"{self.folder}/{sha1[:2]}/{sha1}-{processor_hash}.npy"

    def get(self, sha1: str, processor_hash: str) -> np.ndarray | None:
        """The frames, read-only and mapped from the file; None if they are not here. A damaged file is removed."""
        path = self._file(sha1, processor_hash)
        try:
            with open(path, "rb") as f:
                frames = _frames(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            frames = None
        if frames is None:
            Path(path).unlink(missing_ok=True)
        return frames

    def put(self, sha1: str, processor_hash: str, frames: np.ndarray) -> bool:
        """Keep `frames`; False where the disk did not take them."""
        if self.error:
            return False
        path = self.path(sha1, processor_hash)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as f:
                np.save(f, frames, allow_pickle=False)
            os.replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            self.stop(e)
            return False
        self.note(frames.nbytes)
        return True

    def stop(self, error: OSError) -> None:
        if not self.error:
            self.error = error
            what = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
            print(f"frame cache {self.folder}: {what}; going on without caching more", file=sys.stderr)

    def note(self, nbytes: int) -> None:
        """Count what was written by this process or a worker; evict once in a while."""
        with self._lock:
            self._written += nbytes
            if self._written < self.max_bytes // 16:
                return
            self._written = 0
        self.evict()

    def evict(self) -> None:
        """Remove the oldest files until at most 15/16 of `max_bytes` are used."""
        files = []
        for path in self.folder.glob("*/*"):
            try:
                s = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if path.suffix == ".tmp" and time.time() - s.st_mtime < 3600:
                continue  # being written; later than that, its writer was killed
            files.append((s.st_mtime_ns, s.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= self.max_bytes * 15 // 16:
                return
            path.unlink(missing_ok=True)
            used -= size
