"""Decoding in worker processes with a deadline per sample.

A worker is a plain subprocess on a pipe: it starts without the parent's main module, ends when the pipe
does (however the parent died), and can be killed at any time. A clip that hangs or crashes the decoder
costs its worker, which is replaced, and becomes one BadSample.
"""

import contextlib
import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from data_mix.frame_cache import FrameCache
from data_mix.shards import Location, read_at
from mm.common.errors import BadSample, UserError

START_SECONDS = 120.0  # a worker imports the processor and its libraries before its first sample


@dataclass(frozen=True)
class Job:
    """One image or clip to decode: where its bytes lie, and the [T, H, W] its plan promises."""

    location: Location
    kind: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Call:
    """What the function of an `Apart` is given."""

    given: tuple


def decode(job: Job, processor: Any) -> tuple[np.ndarray, str]:
    """The job's frames, uint8 [T, H, W, 3], and the SHA-1 of its bytes.

    Raises BadSample where the bytes cannot be read or decoded or the frames are not as planned.
    """
    data = read_at(job.location)
    sha1 = hashlib.sha1(data).hexdigest()
    if job.location.sha1 not in ("", sha1):
        raise BadSample("the media's bytes have changed since they were indexed")
    try:
        frames = processor.load_image(data) if job.kind == "image" else processor.load_video(data)[0]
    except BadSample:
        raise
    except Exception as e:
        raise BadSample(f"decoder error: {type(e).__name__}") from e
    if frames.shape[:3] != job.shape:
        raise BadSample("the decoded frames differ from the header's size or count")
    return frames, sha1


def decode_file(processor: Any, path: str, kind: str) -> tuple[np.ndarray, Any]:
    """(uint8 [T, H, W, 3], video plan or None) of a whole file. Raises BadSample."""
    return (processor.load_image(path), None) if kind == "image" else processor.load_video(path)


def decode_here(job: Job, processor: Any, cache: FrameCache | None) -> np.ndarray:
    """Decoded in this process, and kept in the cache."""
    frames, sha1 = decode(job, processor)
    if cache:
        cache.put(sha1, processor.hash, frames)
    return frames


class DecodePool:
    """`submit(job)` -> Future of uint8 [T, H, W, 3], or of a BadSample raised.

    Args:
        workers: processes; 0 decodes in the caller, without a deadline.
        deadline: seconds a sample may take before its worker is killed.
    Use as a context manager, or call `close`: no worker is left, whatever it was doing.
    Attributes: hits, misses: jobs answered by the cache, and not.
    """

    def __init__(
        self, processor: Any, *, workers: int, deadline: float = 20.0, cache: FrameCache | None = None
    ):
        self.processor, self.deadline, self.cache = processor, deadline, cache
        self.workers = [_Worker(processor, cache) for _ in range(workers)]
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self.hits = self.misses = 0
        self._hash = processor.hash
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self.workers]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> "Future[np.ndarray]":
        future: Future[np.ndarray] = Future()
        if (frames := self._cached(job)) is not None:
            self.hits += 1
            future.set_result(frames)
            return future
        self.misses += 1
        if self.workers:
            with self._lock:
                if self._closed:
                    future.cancel()
                else:
                    self._jobs.put((job, future))
        else:
            settle(future, lambda: decode_here(job, self.processor, self.cache))
        return future

    def _cached(self, job: Job) -> np.ndarray | None:
        if self.cache is None or not job.location.sha1:
            return None
        frames = self.cache.get(job.location.sha1, self._hash)
        return frames if frames is not None and frames.shape[:3] == job.shape else None

    def _serve(self, worker: "_Worker") -> None:
        """A thread per worker: it waits, the worker works."""
        while (item := self._jobs.get()) is not None:
            job, future = item
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            settle(future, lambda job=job: worker.run(job, self.deadline))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for worker in self.workers:
            worker.close()
        for thread in self._threads:
            thread.join(timeout=10)
        for worker in self.workers:
            worker.kill()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Apart:
    """A function that opens media, called in a process of its own: what hangs or crashes there is one BadSample. The
    process starts with the first call and ends with `close`, or with this object.

    Args: function of a module (or `functools.partial` of one). deadline: seconds a call may take.
    """

    def __init__(self, function: Callable[..., Any], deadline: float = 60.0):
        self.worker, self.deadline = _Worker(function, None), deadline
        self.close = weakref.finalize(self, self.worker.close)

    def __call__(self, *given: Any) -> Any:
        """What the function returns. Raises BadSample for whatever it raises, and after `deadline` seconds."""
        return self.worker.run(Call(given), self.deadline)


def settle(future: Future, work: Any) -> None:
    try:
        future.set_result(work())
    except BaseException as e:  # the waiting side raises it
        future.set_exception(e)


class _Worker:
    """One decode process and the pipe to it. Started at the first job, replaced after a death."""

    def __init__(self, processor: Any, cache: FrameCache | None):
        """processor: that of all jobs, or the function of all calls; the process has it before its first."""
        self.processor, self.cache = processor, cache
        self.process: subprocess.Popen | None = None
        self._closed, self._lock = False, threading.Lock()

    def run(self, job: Job | Call, deadline: float) -> Any:
        """Frames of a Job, what a Call returns. Raises BadSample."""
        try:
            self._start()
            self._pipe.send(job)
            if not self._pipe.poll(deadline):
                self.kill()
                raise BadSample(f"decoding took longer than {deadline:g} s")
            return self._receive(job)
        except (EOFError, OSError) as e:
            self.kill()
            raise BadSample("the decoder crashed") from e

    def _receive(self, job: Job | Call) -> Any:
        kind, value = self._pipe.recv()
        if kind == "bad":
            raise BadSample(value)
        if isinstance(job, Call):
            return value
        if kind == "raw":  # not cached: the bytes follow
            if self.cache:
                self.cache.stop(value)
            return np.frombuffer(self._pipe.recv_bytes(), np.uint8).reshape(*job.shape, 3)
        assert self.cache is not None
        frames = self.cache.get(value, self.processor.hash)
        if frames is None:  # evicted between the worker's write and here
            return decode(job, self.processor)[0]
        self.cache.note(frames.nbytes)
        return frames

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise BadSample("the loader was closed")
            if self.process is not None:
                return
            self._pipe, theirs = Pipe()
            root = str(Path(__file__).resolve().parents[1])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from data_mix.decode import work; work()", str(theirs.fileno()),
                 str(os.getpid())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            theirs.close()
        self._await_ready()

    def _await_ready(self) -> None:
        folder = str(self.cache.folder) if self.cache else None
        try:
            self._pipe.send((self.processor, folder))
            if self._pipe.poll(START_SECONDS) and self._pipe.recv() == "ready":
                return
        except (EOFError, OSError):
            pass
        said = self.kill()
        if self._closed:
            raise BadSample("the loader was closed")
        raise UserError(f"a decode worker did not start; its last words: {said or 'none'}")

    def kill(self) -> str:
        """End the process if there is one; its last words before it was ready."""
        with self._lock:
            if self.process is None:
                return ""
            self.process.kill()
            _, said = self.process.communicate()
            self._pipe.close()
            self.process = None
            return said.decode(errors="replace").strip()[-500:]

    def close(self) -> None:
        """Kill the process; a thread that waits for it wakes up by the broken pipe."""
        with self._lock:
            self._closed = True
            if self.process is not None:
                self.process.kill()
                self.process.wait()


def work() -> None:
    """The worker's main loop: jobs in, cache entries or frames out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        processor, folder = pipe.recv()
        cache = FrameCache(folder, max_bytes=sys.maxsize) if folder else None  # the parent evicts
        pipe.send("ready")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # codecs babble
        while True:
            _answer(pipe, pipe.recv(), processor, cache)


def _end_with(parent: int) -> None:
    """A worker that hangs in a clip never looks at its pipe: without its parent it has no business."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _answer(pipe: Connection, job: Job | Call, processor: Any, cache: FrameCache | None) -> None:
    try:
        if isinstance(job, Call):
            pipe.send(("value", _called(processor, job)))
            return
        frames, sha1 = decode(job, processor)
    except BadSample as e:
        pipe.send(("bad", e.reason))
        return
    if cache and cache.put(sha1, processor.hash, frames):
        pipe.send(("cached", sha1))
        return
    pipe.send(("raw", cache.error if cache else None))
    pipe.send_bytes(np.ascontiguousarray(frames).reshape(-1).data)


def _called(function: Callable[..., Any], job: Call) -> Any:
    try:
        return function(*job.given)
    except BadSample:
        raise
    except Exception as e:
        raise BadSample(f"decoder error: {type(e).__name__}") from e
