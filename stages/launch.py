"""Several ranks on this machine without a launcher: on CPU cores, processes beat threads at small sizes."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from mm.common.errors import UserError


def launched() -> bool:
    """Whether this process is one of a group already (torchrun's or ours)."""
    return "RANK" in os.environ


def run(ranks: int, arguments: list[str], *, threads: int = 1) -> int:
    """Run `mm ARGUMENTS` as `ranks` processes of one group; returns the first exit code that is not 0.

    Each is in a session of its own, so that a Ctrl-C in the terminal reaches it once, through us. When one
    fails, the others are asked to stop and, after 30 s, killed.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least 1")
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
              "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    crew = [
        subprocess.Popen(
            [sys.executable, "-m", "stages.cli", *arguments], start_new_session=True,
            env={**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(ranks)
    ]  # fmt: skip

    def forward(number: int, _frame: FrameType | None) -> None:
        for p in crew:
            if p.poll() is None:
                p.send_signal(number)

    before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(crew)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait(crew: list[subprocess.Popen[bytes]]) -> int:
    first, since = 0, 0.0
    while any(p.poll() is None for p in crew):
        failed = [p.returncode for p in crew if p.poll() not in (None, 0)]
        if failed and not first:
            first, since = failed[0], time.monotonic()
        if first:  # whoever waits for the one that failed would wait for ever
            late = time.monotonic() - since
            for p in crew:
                if p.poll() is None and late > 5:
                    p.kill() if late > 35 else p.terminate()
        time.sleep(0.1)
    codes = [p.returncode for p in crew if p.returncode]
    code = first or (codes[0] if codes else 0)
    return code if code >= 0 else 128 - code
