"""What a projector makes of a tower and a decoder that never met: captions, or what told pictures give.

From the tower (`s0_vit`) and the decoder (`told_tasks`) of a finished run the projector alone is trained: as
`s1_align` is at tiny; the same by the squared distance from what is told alone; and as published, by the captions of
pictures and clips (next token, the same optimizer). Each for as many steps, of as many packs. Then it answers the
world's test questions; that decoder has been asked no question of a picture that was drawn.

    python benchmarks/projector.py --run runs/quickstart
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness

from eval.evaluate import evaluate_world
from mm import formats
from mm.common.errors import UserError
from stages.engine.train import train
from stages.keye import s1_align
from stages.keye.run import Means, build, load_data, processor_of, tokenizer_of
from stages.stage import Checkpoints, Log, ObjectiveSpec, Stage

ARMS = ("what is told", "what is told, by distance alone", "captions")
NEEDS = ("world", "told_tasks", "s0_vit")
TASKS = ("caption_colour", "caption_shape", "CPV", "ocr")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--run", type=Path, required=True, help="a run that has world, told_tasks and s0_vit")
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help="; ".join(ARMS))
    p.add_argument("--limit", type=int, help="test questions of each task and split (default: all)")
    return p.parse_args(argv)


def artifacts(run: Path) -> dict[str, Path]:
    found = {name: run / name / ("world" if name == "world" else "model") for name in NEEDS}
    for name, path in found.items():
        if not path.exists():
            raise UserError(f"--run {run} has not made {name!r}; make it with: mm run keye --size tiny --to s0")
    return found


def stage_of(arm: str, steps: int, seed: int) -> Stage:
    stage = s1_align.stage("tiny")
    if arm == "captions":
        stage = replace(stage, mix=s1_align.MIX, objective=ObjectiveSpec("next_token"))
    elif arm != "what is told":
        stage = replace(stage, objective=ObjectiveSpec("told_features", {"words": 0.0, "distance": 1.0}))
    warmup = min(stage.optim.warmup_steps, steps // 2)
    stage = replace(stage, budget=replace(stage.budget, steps=steps), optim=replace(stage.optim, warmup_steps=warmup))
    return replace(stage, seed=seed, checkpoint=Checkpoints(every_steps=0), log=Log(tensorboard=False)).check()


def run(a: argparse.Namespace, arm: str, seed: int, means: Means) -> dict[str, Any]:
    """Train one arm and let it answer: {"task/split": value, ...}; seconds are those of the training."""
    stage, start = stage_of(arm, a.steps, seed), time.monotonic()
    tokenizer, processor = tokenizer_of(stage, means), processor_of(stage)
    with tempfile.TemporaryDirectory() as name, load_data(stage, tokenizer, processor, means) as loader:
        folder = Path(name)
        made = train(stage, folder / "stage", model=build(stage, tokenizer, means), loader=loader, quiet=True,
                     hand_on=lambda where, model: formats.save(where, model, processor, tokenizer))  # fmt: skip
        seconds = time.monotonic() - start
        scores = evaluate_world(made, means.artifacts["world"], folder / "eval", tasks=TASKS, limit=a.limit,
                                blind=False, probe=False, quiet=True)["tasks"]  # fmt: skip
    values = {key: score["value"] for key, score in scores.items()}
    print(f"{arm} seed {seed}: {', '.join(f'{k} {v:.2f}' for k, v in values.items())}, {seconds:.0f} s", flush=True)
    return {"arm": arm, "seed": seed, "seconds": seconds, "values": values,
            "n": {key: score["n"] for key, score in scores.items()}}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    about, found = harness.machine(), artifacts(a.run)
    with tempfile.TemporaryDirectory() as cache:
        means = Means(found, {}, cache=Path(cache), workers=0, quiet=True)
        runs = [run(a, arm, seed, means) for seed in range(a.seeds) for arm in a.arms]
    keys, rows = list(runs[0]["values"]), []
    for arm in a.arms:
        mine = [r for r in runs if r["arm"] == arm]
        cells = [harness.shown(harness.spread([r["values"][k] for r in mine])) for k in keys]
        rows.append((arm, *cells, f"{statistics.median(r['seconds'] for r in mine):.0f}"))
    notes = ["n: " + ", ".join(f"{k} {n}" for k, n in runs[0]["n"].items()),
             "one tower, one decoder and one start of the projector for all; a seed is that of the data's order"]
    title = f"a projector after {a.steps} steps, {a.seeds} seeds: median (least to most)"
    return harness.report(a, title, about, ("learns", *keys, "seconds"), rows, {"runs": runs}, notes)


if __name__ == "__main__":
    harness.run(main)
