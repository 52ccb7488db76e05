"""Under the real torchrun: one node, two nodes on loopback, and a worker that dies and is started again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm.common.files import read_jsonl
from tests.stages.engine_launch import free_port
from tests.stages.test_engine_resume import check_draws

HERE = Path(__file__).resolve().parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}


def torchrun(folder, *args, **settings):
    job = [str(HERE / "engine_jobs.py"), "run", str(folder), json.dumps(settings)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *args, *job], env=ENV, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(*agents):
    out = "".join(a.communicate(timeout=180)[0] for a in agents)
    assert all(a.returncode == 0 for a in agents), out[-4000:]
    return out


def test_one_node_with_a_restart(tmp_path):
    """A worker is killed before step 6; torchrun starts both again, they go on from step 4."""
    args = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1")
    finish(torchrun(tmp_path, *args, steps=8, at={"6": "die"}))
    check_draws(tmp_path, 8)
    attempts = read_jsonl(tmp_path / "attempts.jsonl")
    assert [a["ranks"] for a in attempts] == [2, 2] and attempts[1]["from_step"] in (0, 4)


@pytest.mark.parametrize("how", [pytest.param("static", marks=pytest.mark.slow), "c10d"])
def test_two_nodes_on_loopback(tmp_path, how):
    """Static: plain. c10d: a worker on the second node dies, both agents restart their workers."""
    port, agents = free_port(), []
    for node in range(2):
        args = ["--nnodes", "2", "--nproc-per-node", "1", "--monitor-interval", "0.1"]
        if how == "static":
            args += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        else:
            args += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "t",
                     "--max-restarts", "2"]  # fmt: skip
        agents.append(torchrun(tmp_path, *args, steps=8, at={} if how == "static" else {"6": "die"}))
    finish(*agents)
    check_draws(tmp_path, 8)
    assert len(read_jsonl(tmp_path / "attempts.jsonl")) == (1 if how == "static" else 2)
