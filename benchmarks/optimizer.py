"""Muon against AdamW for training from nothing at tiny size: the loss reached, and with what share of the steps.

The stage's own model, data, schedule, weight decay and warm-up; only the optimizer and the number of steps
differ. AdamW first gets its learning rate from a grid (seed 0), Muon keeps the stage's. Then both run with
every seed: AdamW for all steps, Muon for all and for shares of them, each with the whole schedule fitted to
its own length. The loss is the finished model's on fixed packs, the same for every run, drawn from the same
sources by another seed.

    python benchmarks/optimizer.py --world WORLD --stage keye.text
    python benchmarks/optimizer.py --world WORLD --stage keye.s0_vit
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import harness
import torch

from mm.common.precision import settle
from mm.tokenizer import Tokenizer
from stages import objectives
from stages.engine.train import train
from stages.keye.recipe import STAGES
from stages.keye.run import Means, build, load_data, processor_of
from stages.stage import Checkpoints, Log, Stage

Name = Literal["adamw", "muon"]
EVAL_SEED = 1_000_003


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--world", type=Path, required=True, help="a world folder (mm data make-world)")
    p.add_argument("--stage", choices=["keye.text", "keye.s0_vit"], default="keye.text")
    p.add_argument("--steps", type=int, default=0, help="of the longest runs (default: the stage's)")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--lrs", default="1e-3,3e-3,6e-3", help="AdamW's grid, tried with seed 0")
    p.add_argument("--shares", default="1,0.67,0.5,0.33", help="Muon's shares of the steps")
    p.add_argument("--eval-packs", type=int, default=16)
    return p.parse_args(argv)


def variant(a: argparse.Namespace, name: Name, lr: float | None, steps: int, seed: int) -> Stage:
    """The stage with another optimizer, length and seed; the warm-up keeps its number of steps where it can."""
    stage = STAGES[a.stage]("tiny")
    optim = replace(
        stage.optim, name=name, lr=lr or stage.optim.lr, warmup_steps=min(stage.optim.warmup_steps, steps // 2)
    )
    return replace(
        stage, start=["scratch"], optim=optim, seed=seed, budget=replace(stage.budget, steps=steps),
        checkpoint=Checkpoints(every_steps=0), log=Log(tensorboard=False),
    ).check()  # fmt: skip


def eval_batches(a: argparse.Namespace, tokenizer: Tokenizer, means: Means) -> list[Any]:
    stage = replace(STAGES[a.stage]("tiny"), seed=EVAL_SEED)
    with load_data(stage, tokenizer, processor_of(stage), means) as loader:
        return [batch for _ in range(a.eval_packs) for batch in next(loader)]


@torch.no_grad()
def evaluate(stage: Stage, model: Any, batches: list[Any]) -> float:
    """The stage's loss per trained token, or per image, in its own precision."""
    total = count = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=settle(stage.precision, torch.device("cpu")) == "bf16"):
        for batch in batches:
            if stage.objective.name == "next_token":
                loss, n = model.loss(batch)
            else:
                image = model.image_embeds(batch.pixel_values, batch.grid_thw)
                text = model.text_embeds(batch.input_ids, batch.cu_seqlens)
                scale, bias = model.logit_scale, model.logit_bias
                loss = objectives.contrastive.pair_loss(image, text, 0, scale, bias)
                n = len(image)
            total, count = total + float(loss), count + n
    return total / count


def loss_of(stage: Stage, tokenizer: Tokenizer, means: Means, batches: list[Any]) -> float:
    """Train to the end, then the loss on the fixed packs."""
    found: list[float] = []

    def hand_on(_: Path, model: Any) -> None:
        found.append(evaluate(stage, model, batches))

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, load_data(stage, tokenizer, processor_of(stage), means) as loader:
        train(stage, folder, model=build(stage, tokenizer, means), loader=loader, hand_on=hand_on, quiet=True)
    o = stage.optim
    print(f"{stage.name} {o.name} lr {o.lr:g} {stage.budget.steps} steps seed {stage.seed}: loss {found[0]:.4f}, "
          f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
    return found[0]


def measure(a: argparse.Namespace, tokenizer: Tokenizer, means: Means) -> harness.Json:
    batches = eval_batches(a, tokenizer, means)
    steps = a.steps or STAGES[a.stage]("tiny").budget.steps

    def loss(name: Name, lr: float | None, n: int, seed: int) -> float:
        return loss_of(variant(a, name, lr, n, seed), tokenizer, means, batches)

    grid = {float(lr): loss("adamw", float(lr), steps, 0) for lr in a.lrs.split(",")}
    best = min(grid, key=lambda lr: grid[lr])
    adamw = [grid[best], *(loss("adamw", best, steps, seed) for seed in range(1, a.seeds))]
    muon = {
        share: [loss("muon", None, max(round(steps * share), 1), seed) for seed in range(a.seeds)]
        for share in map(float, a.shares.split(","))
    }
    return {"stage": a.stage, "steps": steps, "grid": grid, "adamw_lr": best, "adamw": adamw, "muon": muon}


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    about = harness.machine()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = harness.world_tokenizer(a.world)
        figures = measure(a, tokenizer, Means({"world": a.world}, {}, cache=Path(folder), quiet=True))
    adamw = statistics.median(figures["adamw"])
    rows = [("AdamW", f"{figures['adamw_lr']:g}", figures["steps"],
             harness.shown(harness.spread(figures["adamw"]), ".4f"), "")]  # fmt: skip
    for share, losses in figures["muon"].items():
        steps, wins = max(round(figures["steps"] * share), 1), sum(
            m <= w for m, w in zip(losses, figures["adamw"], strict=True)
        )
        rows.append(("Muon", f"{STAGES[a.stage]('tiny').optim.lr:g}", steps,
                     harness.shown(harness.spread(losses), ".4f"), f"{wins} of {len(losses)}"))  # fmt: skip
    enough = [s for s, losses in figures["muon"].items() if statistics.median(losses) <= adamw]
    figures["smallest_share_as_good"] = min(enough, default=None)
    notes = [
        f"AdamW's grid, seed 0: {', '.join(f'{lr:g}: {v:.4f}' for lr, v in figures['grid'].items())}",
        f"smallest share of the steps with which Muon's median loss is as low: {min(enough, default='none')}",
    ]
    columns = ("optimizer", "lr", "steps", "loss, median (least to most)", "as low as AdamW, by seed")
    return harness.report(a, f"{a.stage} at tiny from nothing", about, columns, rows, figures, notes)


if __name__ == "__main__":
    harness.run(main)
