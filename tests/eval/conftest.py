"""A checkpoint with random weights, and a run folder that looks like a real one."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import world
from eval.runner import Options, run
from mm import formats
from mm.common.files import write_json
from mm.keye import Keye
from mm.sizes import PROCESSORS, SIZES
from mm.tokenizer import Tokenizer
from tests.eval.eval_answerers import Guesser


@pytest.fixture(scope="session")
def checkpoint(micro_world, tmp_path_factory) -> Path:
    texts = [line for p in sorted((micro_world / "text").glob("*.jsonl")) for line in p.read_text().splitlines()]
    tokenizer = Tokenizer.train(texts, 512)
    config = SIZES["tiny"]
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, vocab_size=tokenizer.vocab_size, num_hidden_layers=1),
        vision=dataclasses.replace(config.vision, num_hidden_layers=1),
    ).bound(tokenizer)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("eval") / "model"
    formats.save(folder, Keye(config), PROCESSORS["tiny"], tokenizer)
    return folder


NODES = [
    ("world", [], 95), ("tokenizer", ["world"], 4), ("text", ["tokenizer"], 61), ("s0_vit", ["world"], 118),
    ("s1_align", ["text", "s0_vit"], 40), ("s2_multitask", ["s1_align"], 310), ("s3_anneal_a", ["s2_multitask"], 58),
    ("s3_anneal_b", ["s2_multitask"], 57), ("merge", ["s3_anneal_a", "s3_anneal_b"], 0.4), ("eval", ["merge"], 47),
]  # fmt: skip


def log_rows(steps: int, seed: int) -> list[dict]:
    random = np.random.default_rng(seed)
    noise = lambda scale: float(random.normal(0, scale))
    return [
        {"step": i + 1, "attempt": 0, "loss": {"text": 0.4 + 3 * math.exp(-i / steps * 5) + noise(0.08)},
         "grad_norm": 1.2 + abs(noise(0.4)), "lr": 1e-3, "tokens_per_second": 5200 + noise(300)}
        for i in range(steps)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(micro_world, tmp_path_factory) -> Path:
    """Ten nodes, five logs, an evaluation of a model that is right two times in three, and a clip that is broken."""
    root = tmp_path_factory.mktemp("eval") / "quickstart"
    nodes = [{"name": n, "inputs": i, "seconds": s, "status": "done"} for n, i, s in NODES]
    write_json(root / "pipeline.json", {
        "title": "keye, tiny", "command": "mm run keye --size tiny --to s3 --out runs/quickstart", "nodes": nodes,
        "environment": {"python": "3.11", "torch": torch.__version__, "device": "cpu", "cores": 2, "ranks": 1},
        "skipped": {"s2_multitask": {"0 frames": 2, "not an image: broken data stream": 1}},
    })  # fmt: skip
    for k, name in enumerate(("text", "s0_vit", "s1_align", "s2_multitask")):
        (root / name).mkdir()
        rows = log_rows(240, k)
        (root / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tasks = world.load_tasks(micro_world)
    broken = micro_world / tasks[0].items[0].media[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    info = {"benchmark": "world", "data": str(micro_world)}
    run(Guesser(tasks, PROCESSORS["tiny"]), tasks, root / "eval", info, Options(quiet=True))
    broken.write_bytes(whole)
    return root
