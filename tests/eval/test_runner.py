"""The runner on real files: every row kept, floors honest, stopped and resumed, bad media named."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import responses
from eval.runner import Options, make_jobs, run
from eval.scores import FLOORS, rescore
from mm.common.errors import UserError
from tests.eval.eval_answerers import ColourReader, colour_task, lines

INFO = {"benchmark": "test", "checkpoint_fingerprint": "a", "data_fingerprint": "b"}
ENV = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
QUIET = Options(batch_size=4, quiet=True)


def test_every_answer_is_kept_and_scored_against_floors(tmp_path):
    task, model = colour_task(tmp_path / "data"), ColourReader()
    result = run(model, [task], tmp_path / "out", INFO, QUIET)
    assert set(result["tasks"]) == {"colour/seen", "colour/unseen"}
    for entry in result["tasks"].values():
        assert set(entry) == {"value", "n", "ci95", "ceiling", "split", *FLOORS}
        assert entry["value"] == 1.0 and entry["n"] == 15 and entry["chance"] == pytest.approx(1 / 3)
        assert entry["blind"] < 0.5 and entry["majority"] < 0.5  # grey shows no colour
        assert entry["probe"] == 1.0  # colours are all that this task asks
    rows = [r for r in lines(tmp_path / "out" / "responses.jsonl") if "task" in r]
    assert len(rows) == 4 * 30
    for name in ("prompt", "response", "parsed", "answer", "score", "split", "variant", "media"):
        assert all(name in r for r in rows)
    assert model.calls == 30 + 5  # blind, the thirty questions are five
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result == rescore(tmp_path / "out")
    assert run(model, [task], tmp_path / "out", INFO, QUIET)["tasks"] == result["tasks"]
    assert model.calls == 35  # nothing is asked again


def test_one_generation_serves_tasks_that_share_a_prompt(tmp_path):
    task = colour_task(tmp_path / "data", n=6, train=0)
    twin = dataclasses.replace(
        task, name="twin", items=[dataclasses.replace(i, task="twin") for i in task.items], max_new_tokens=40
    )
    model = ColourReader()
    result = run(model, [task, twin], tmp_path / "out", INFO, dataclasses.replace(QUIET, blind=False, probe=False))
    assert model.calls == 6 and len(result["tasks"]) == 4
    assert result["tasks"]["twin/seen"]["blind"] is None and result["tasks"]["twin/seen"]["probe"] is None
    assert [j.max_new_tokens for j in make_jobs([task, twin])] == [40] * 6
    assert "cross-validated" in result["run"]["notes"][-1]  # no training rows


def test_stopped_by_ctrl_c_and_resumed(tmp_path, capsys):
    task, whole = colour_task(tmp_path / "data"), ColourReader()
    want = run(whole, [task], tmp_path / "whole", INFO, QUIET)
    with pytest.raises(KeyboardInterrupt):
        run(ColourReader(stop_after=10), [task], tmp_path / "out", INFO, QUIET)
    assert "go" in capsys.readouterr().out
    kept = sum("task" in r for r in lines(tmp_path / "out" / "responses.jsonl"))
    assert kept >= 8
    with open(tmp_path / "out" / "responses.jsonl", "a") as f:
        f.write('{"task": "colour", "id": "half a li')  # a kill in the middle of a write
    model = ColourReader()
    got = run(model, [task], tmp_path / "out", INFO, QUIET)
    assert got["tasks"] == want["tasks"] and model.calls < whole.calls
    keys = [responses.key(r) for r in lines(tmp_path / "out" / "responses.jsonl") if "task" in r]
    assert len(keys) == len(set(keys)) == 120


KILLED = """
import sys, time
from pathlib import Path
from eval.runner import Options, run
from tests.eval.eval_answerers import ColourReader, colour_task
class Slow(ColourReader):
    def answer(self, examples, cap):
        time.sleep(0.05)
        return super().answer(examples, cap)
root = Path(sys.argv[1])
run(Slow(), [colour_task(root / "data")], root / "out",
    {"benchmark": "test", "checkpoint_fingerprint": "a", "data_fingerprint": "b"}, Options(batch_size=2, quiet=True))
"""


def test_killed_and_resumed(tmp_path):
    """SIGKILL in the middle; what was answered is not asked again, and the scores are the same."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=ENV)
    path = tmp_path / "out" / "responses.jsonl"
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().count("\n") > 12) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    task, model = colour_task(tmp_path / "data"), ColourReader()
    got = run(model, [task], tmp_path / "out", INFO, QUIET)
    assert model.calls < 35
    assert got["tasks"] == run(ColourReader(), [task], tmp_path / "whole", INFO, QUIET)["tasks"]


def test_bad_media_are_skipped_counted_named_and_asked_again_once_mended(tmp_path):
    task = colour_task(tmp_path / "data", n=8)
    broken = tmp_path / "data" / "p3.png"
    good = broken.read_bytes()
    broken.write_bytes(b"this is text")
    result = run(ColourReader(), [task], tmp_path / "out", INFO, QUIET)
    assert result["run"]["skipped"] == {"not an image": 1}
    assert result["run"]["skipped_items"] == ["colour/003: not an image"]
    assert result["tasks"]["colour/seen"]["n"] == 3
    broken.write_bytes(good)
    result = run(ColourReader(), [task], tmp_path / "out", INFO, QUIET)
    assert result["run"]["skipped"] == {} and result["tasks"]["colour/seen"]["n"] == 4


def test_another_checkpoint_needs_another_folder(tmp_path):
    task = colour_task(tmp_path / "data", n=2, train=0)
    run(ColourReader(), [task], tmp_path / "out", INFO, QUIET)
    with pytest.raises(UserError, match="another checkpoint"):
        run(ColourReader(), [task], tmp_path / "out", {**INFO, "checkpoint_fingerprint": "c"}, QUIET)
    with pytest.raises(UserError, match="run `mm eval`"):
        rescore(tmp_path / "nowhere")


RANKS = """
import sys, json
from pathlib import Path
from eval.runner import Options, run
from mm.common import dist
from tests.eval.eval_answerers import ColourReader, colour_task
root = Path(sys.argv[1])
dist.init("cpu")
task = colour_task(root / f"data{dist.rank()}")
task = task.__class__(**{**vars(task), "root": root / "data0"})
dist.barrier()
model = ColourReader()
info = {"benchmark": "test", "checkpoint_fingerprint": "a", "data_fingerprint": "b"}
result = run(model, [task], root / "out", info, Options(batch_size=4, quiet=True))
assert 0 < model.calls < 30, model.calls
(root / f"result{dist.rank()}.json").write_text(json.dumps(result["tasks"]))
dist.shutdown()
"""


def test_two_ranks_share_the_work_and_agree(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29631",
         str(tmp_path / "ranks.py"), str(tmp_path)],
        check=True, env=ENV, timeout=100,
    )  # fmt: skip
    want = run(ColourReader(), [colour_task(tmp_path / "one")], tmp_path / "alone", INFO, QUIET)["tasks"]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"result{rank}.json").read_text()) == want
    assert not list((tmp_path / "out").glob("responses.rank*"))
