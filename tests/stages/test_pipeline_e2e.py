"""The whole road as a user walks it: a world in, a scored model and a page out; interrupted, called again, done."""

import json
import os
import re
import signal
import subprocess
import sys

from eval.scores import FLOORS
from mm.common.files import read_json
from mm.processor import Processor
from mm.sizes import PROCESSORS
from stages.engine.log import lineage

NODES = ("tokenizer", "text", "told", "told_compare", "told_tasks", "words", "s0_vit", "s1_align", "s2_multitask",
         "s3_anneal_image", "s3_anneal_video", "s3_merge", "eval")  # fmt: skip
SMALL = [f"--set={s}.budget.{k}={v}" for s in NODES[7:11] for k, v in (("tokens", 768), ("visual_tokens", 576))]


def mm(*arguments, interrupt_at=None, seconds=120):
    """(exit code, what was printed) of an `mm` command, Ctrl-C sent when a line holds `interrupt_at`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stages.cli", *map(str, arguments)]
    out, sent = [], False
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.append(line)
                if interrupt_at and interrupt_at in line and not sent:
                    process.send_signal(signal.SIGINT)
                    sent = True
            return process.wait(seconds), "".join(out)
        finally:
            process.kill()


def test_interrupted_called_again_and_up_to_date(micro_world, tmp_path):
    run = tmp_path / "run"
    command = ["run", "keye", "--scale", "0.001", "--to", "s3", "--world", micro_world, "--out", run, "--ranks", 1,
               "--workers", 0, "--threads", 1, "--set=s2_multitask.budget.steps=5",
               "--set=s2_multitask.log.every_steps=1", *SMALL]  # fmt: skip
    code, said = mm(*command, interrupt_at="step 1/5")
    end = re.search(r"stopped at step (\d) of 5, saved; the same command goes on", said)
    assert code == 130 and end, said
    after = said[said.index("finishing this step") :]
    assert after.count("| grad") <= 1, f"more than the step under way was made:\n{after}"
    assert "Traceback" not in said and not (run / "s2_multitask/model").exists()

    code, said = mm(*command)
    assert code == 0, said
    assert "s1_align: up to date" in said and "s2_multitask: going on" in said
    assert f"going on from step {end[1]} of 5" in said
    assert [row["step"] for row in lineage(run / "s2_multitask")] == [1, 2, 3, 4, 5]
    shown = {name: Processor.load(run / name / "model") for name in ("words", "s0_vit", "s3_merge")}
    assert shown["words"].frame_max_tokens < shown["s0_vit"].frame_max_tokens  # a stage may name its own processor
    assert shown["s0_vit"] == shown["s3_merge"] == PROCESSORS["tiny"]
    tasks = read_json(run / "eval/scores.json")["tasks"]
    fields = {"value", "n", "ci95", "ceiling", "split", *FLOORS}
    assert len(tasks) == 26 and all(set(t) == fields for t in tasks.values())
    answers = [json.loads(line) for line in (run / "eval/responses.jsonl").read_text().splitlines()]
    assert sum(t["n"] for t in tasks.values()) <= len(answers)
    assert f"the report: {run}/report.html" in said
    page = (run / "report.html").read_text()
    assert all(name in page for name in NODES) and "<video" in page and "<svg" in page
    assert {n["name"]: n["status"] for n in read_json(run / "pipeline.json")["nodes"]} == dict.fromkeys(
        ("world", *NODES), "done"
    )

    made = {p: p.stat().st_mtime_ns for p in run.glob("*/model/model.safetensors")}
    code, said = mm(*command)
    assert code == 0 and all(f"{name}: up to date" in said for name in NODES), said
    assert "running" not in said and "going on" not in said
    assert made == {p: p.stat().st_mtime_ns for p in run.glob("*/model/model.safetensors")} and len(made) == 11
