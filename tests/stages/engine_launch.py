"""Start jobs of engine_jobs.py in processes of their own, with the ranks torchrun would give them.

The processes are forked from one server that has torch loaded already: a rank starts in a tenth of a second.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

from mm.common import dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.stages.engine_jobs", "torch._dynamo", "rich.console"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(job: str, folder: str, settings: str, env: dict[str, str], output: str) -> None:
    import torch

    from tests.stages import engine_jobs

    torch.set_num_threads(1)
    os.environ.update(env)
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    dist.init("cpu")
    getattr(engine_jobs, job)(folder, settings)
    dist.shutdown()
    sys.stdout.flush()


class Group:
    """The processes of one launch."""

    def __init__(self, job: str, folder: Path, ranks: int, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.outputs = [folder / f"output-{time.monotonic_ns()}-{rank}.txt" for rank in range(ranks)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            args = (job, str(folder), json.dumps(settings), env, str(output))
            self.processes.append(CONTEXT.Process(target=child, args=args))
        for p in self.processes:
            p.start()

    def kill(self) -> None:
        """SIGKILL to every rank, in any order."""
        for p in random.sample(self.processes, len(self.processes)):
            p.kill()
        for p in self.processes:
            p.join()

    def wait(self, *, fine: bool = True, timeout: float = 120) -> str:
        """Everything they printed, rank by rank. With `fine` each must have ended well."""
        end = time.monotonic() + timeout
        for p in self.processes:
            p.join(max(end - time.monotonic(), 0.1))
        hung = [p for p in self.processes if p.is_alive()]
        for p in hung:
            p.kill()
        out = "".join(path.read_text() for path in self.outputs if path.exists())
        assert not hung, f"hung\n{out[-4000:]}"
        assert not fine or all(p.exitcode == 0 for p in self.processes), out[-4000:]
        return out


def run(job: str, folder: Path, *, ranks: int = 1, fine: bool = True, **settings) -> str:
    return Group(job, folder, ranks, settings).wait(fine=fine)


def losses(folder: Path) -> list[float]:
    """The first term's loss at each step of the surviving lineage."""
    from stages.engine.log import lineage

    return [next(iter(row["loss"].values())) for row in lineage(folder, "log.jsonl")]


def weights(folder: Path) -> dict:
    import torch

    return torch.load(folder / "model" / "weights.pt")
