"""Ranks without torchrun: they form a group, a failure ends them all, an interrupt reaches each once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm.common.errors import UserError
from stages import launch

ROOT = Path(__file__).resolve().parents[2]


def crew(monkeypatch, tmp_path, body: str) -> None:
    """Make `python -m stages.cli` of the children run `body` instead."""
    package = tmp_path / "stages"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
    monkeypatch.chdir(tmp_path)


def test_ranks_form_a_group(monkeypatch, tmp_path):
    body = """
import torch
from pathlib import Path
from mm.common import dist
dist.init("cpu")
total = dist.sum_tensor(torch.tensor([dist.rank() + 1.0]))
Path(f"rank{dist.rank()}").write_text(str(float(total)))
dist.shutdown()
"""
    crew(monkeypatch, tmp_path, body)
    assert launch.run(2, []) == 0
    assert [(tmp_path / f"rank{i}").read_text() for i in range(2)] == ["3.0", "3.0"]


def test_one_failure_ends_all(monkeypatch, tmp_path):
    body = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    crew(monkeypatch, tmp_path, body)
    begun = time.monotonic()
    assert launch.run(2, []) == 3
    assert time.monotonic() - begun < 30


def test_an_interrupt_reaches_each_rank_once(tmp_path, monkeypatch):
    body = """
import os, signal, time
from pathlib import Path
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
Path(f"ready{os.environ['RANK']}").touch()
end = time.monotonic() + 20
while not seen and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(0.5)
Path(f"seen{os.environ['RANK']}").write_text(str(len(seen)))
"""
    crew(monkeypatch, tmp_path, body)
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from stages import launch; sys.exit(launch.run(2, []))"
    parent = subprocess.Popen([sys.executable, "-P", "-c", source], start_new_session=True, cwd=tmp_path)
    end = time.monotonic() + 20
    while time.monotonic() < end and not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does: the whole foreground group gets it
    assert parent.wait(timeout=30) == 0
    assert [(tmp_path / f"seen{i}").read_text() for i in range(2)] == ["1", "1"]


def test_no_rank_is_an_error():
    with pytest.raises(UserError, match="at least 1"):
        launch.run(0, [])
