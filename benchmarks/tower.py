"""What a tower knows of single things after so many steps from nothing: named regions against whole captions.

Two ways to teach the tiny tower, each with its stage's own data, optimizer and schedule (`keye.words`: every patch
of a region tells the words of its name and where it is; `keye.s0_vit`: the sigmoid loss of whole pictures and
their captions), started from random weights, with as many visual tokens a step; and the first of them once more with
one thing changed: no loss of places, or one that weighs as much as that of words, every word a rival of every other
(`data_mix.regions.Names`), SigLIP's own random start of attention in place of the mimetic one (`vision/init.py`), or
frames as large as later stages show them; and untrained. Measured on things in the first frames of the world's test
clips. "probe" is the same for all and was trained by none: a logistic model on the mean feature of the patches under
a thing's box, fitted on three of four clips and scored on the fourth; "place" the same with a linear model of the
box's centre, and how much of its variance that tells. "told" asks the tower's own words which of the six shapes those
patches show, of things whose colour and shape training never showed together, and of the others; which letter each
place of a sign shows, of all that stand on the test clips' signs; and at each place of what moves in some hundred
clips seen whole, which of six motions it makes, and which way it slides.

    python benchmarks/tower.py --world WORLD
    python benchmarks/tower.py --world WORLD --steps 500 --lrs 8e-3 --arms keye.words "keye.words, full places"
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
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_mix.regions import in_patches, regions_of
from data_mix.world import tasks
from data_mix.world.render import letters as letters_of
from data_mix.world.stills import thousand
from data_mix.world.words import HELD_COLOUR_SHAPE, SHAPES
from mm.common.errors import UserError
from mm.common.files import read_json
from mm.sizes import PROCESSORS
from mm.tokenizer import Tokenizer
from stages.engine.train import train
from stages.keye.recipe import STAGES
from stages.keye.run import Means, build, load_data, processor_of
from stages.stage import Checkpoints, Log, ObjectiveSpec
from vision.init import stream
from vision.vit import normalise

WORDS, ALL, PLAIN = "keye.words", "keye.words, all words rivals", "keye.words, SigLIP's start"
PLACES = {"keye.words, no places": 0.0, "keye.words, full places": 1.0}  # arm -> weight of their loss
LARGE, UNTRAINED = "keye.words, shown large", "keye.words, untrained"
ARMS = (WORDS, *PLACES, ALL, PLAIN, LARGE, "keye.s0_vit", UNTRAINED)
ASKED = ("colour", "shape", "material")
TOLD = ("told, held-out pairs", "told, other pairs", "told, letters", "told, motion", "told, which way")
MOVES = ("slides", "rises", "falls", "bounces", "splits", "vanishes")
WAYS = ("left", "right")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--world", type=Path, required=True, help="a world folder (mm data make-world)")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--lrs", default="4e-3,8e-3", help="grid of every arm; the best by shape with seed 0 is kept")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help="; ".join(ARMS))
    return p.parse_args(argv)


def things(world: Path) -> list[tuple[np.ndarray, Any, list[tuple[Any, dict]], list[tuple[Any, str]]]]:
    """Per test clip: the first frame as the processor shows it [1, H, W, 3], its grid, each thing plain to see as
    (top, left, bottom, right) in patches with its attributes, and so each letter of a sign."""
    processor, out = PROCESSORS["tiny"], []
    for path in sorted((world / "clips" / "test").glob("*.json")):
        truth = read_json(path)
        frames = processor.load_video(path.with_suffix(".mp4"))[0][:1]
        grid = processor.frames_grid(frames)
        at = zip(truth["things"], truth["boxes"][0], truth["seen"][0], strict=True)
        found = [(in_patches(thousand(boxes[0], truth), *grid[1:]), t) for t, boxes, seen in at if seen >= 0.5]
        read = [(in_patches(thousand(box, truth), *grid[1:]), letter) for s in truth["signs"]
                for letter, box in letters_of(s["text"], s["box"], min(truth["width"], truth["height"]))]  # fmt: skip
        out.append((frames, grid, found, read))
    if len(out) < 4:
        raise UserError(f"--world {world}: fewer than four test clips; make one with: mm data make-world {world}")
    return out


def moves(world: Path, most: int = 100) -> list[tuple[np.ndarray, Any, list[tuple[int, Any, list[str]]]]]:
    """Per test clip: the frames that the processor shows [T, H, W, 3], their grid, and each place of what moves as
    (frame, (top, left, bottom, right) in patches, words of the motion)."""
    processor, out = PROCESSORS["tiny"], []
    paths = sorted((world / "clips" / "test").glob("*.json"))
    for path in paths[:: max(1, len(paths) // most)]:  # of both splits
        truth = read_json(path)
        frames, plan = processor.load_video(path.with_suffix(".mp4"))
        grid, found = processor.frames_grid(frames), []
        for region in regions_of(tasks.named_at(truth, list(range(len(truth["times"]))))):
            _, _, _, *motion = region.phrase.split(" ") if len(region.phrase) > 1 else ("",) * 3
            if motion and motion[0] in MOVES:
                found += [(k, in_patches(region.box, *grid[1:]), motion) for k in region.frames(plan)]
        out.append((frames, grid, found))
    return out


def features_of(tower: Any, frames: np.ndarray, grid: Any) -> torch.Tensor:
    """Features [T, h, w, D] of frames uint8 [T, H, W, 3]."""
    pixels = torch.from_numpy(PROCESSORS["tiny"].patchify(frames))
    return tower(normalise(pixels, torch.float32), torch.tensor([grid])).view(*grid, -1)


@torch.no_grad()
def measured(model: Any, tokenizer: Tokenizer, clips: tuple[Sequence[Any], Sequence[Any]]) -> dict[str, float]:
    """Accuracy of a logistic model per attribute and R2 of a linear one of places (clip i is for testing where
    i % 4 == 3), and accuracy of the tower's own words, of what `things` and `moves` have found."""
    tower, (firsts, moving) = model.vision_model, clips
    table = model.text_model.embeddings.token_embedding.weight
    alphabet = sorted({letter for *_, read in firsts for _, letter in read})
    letters = table[[tokenizer.encode(letter)[0] for letter in alphabet]]
    shapes, motions, ways = (table[[tokenizer.encode(" " + w)[-1] for w in words]] for words in (SHAPES, MOVES, WAYS))
    rows: list[np.ndarray] = []
    told: dict[str, list[bool]] = {key: [] for key in TOLD}
    facts: list[tuple[int, dict]] = []
    centres: list[tuple[float, float]] = []  # row and column, in shares of the frame
    for i, (frames, grid, found, read) in enumerate(firsts):
        features = features_of(tower, frames, grid)[0]
        for (top, left, bottom, right), thing in found:
            mean = features[top:bottom, left:right].flatten(0, 1).mean(0)
            rows.append(mean.numpy())
            centres.append(((top + bottom) / 2 / grid[1], (left + right) / 2 / grid[2]))
            held = (thing["colour"], thing["shape"]) in HELD_COLOUR_SHAPE
            told[TOLD[0 if held else 1]].append(SHAPES[int((shapes @ mean).argmax())] == thing["shape"])
            facts.append((i, thing))
        for (top, left, bottom, right), letter in read:
            mean = features[top:bottom, left:right].flatten(0, 1).mean(0)
            told[TOLD[2]].append(alphabet[int((letters @ mean).argmax())] == letter)
    for frames, grid, found in moving:
        features = features_of(tower, frames, grid)
        for k, (top, left, bottom, right), motion in found:
            mean = features[k, top:bottom, left:right].flatten(0, 1).mean(0)
            told[TOLD[3]].append(MOVES[int((motions @ mean).argmax())] == motion[0])
            if motion[0] == "slides":
                told[TOLD[4]].append(WAYS[int((ways @ mean).argmax())] == motion[1])
    x, test = np.stack(rows), np.array([i % 4 == 3 for i, _ in facts])
    out = {key: float(np.mean(hits)) for key, hits in told.items()}
    y = np.array(centres)
    guess = make_pipeline(StandardScaler(), Ridge(alpha=10.0)).fit(x[~test], y[~test]).predict(x[test])
    out["place"] = float(1 - (np.square(guess - y[test]).mean(0) / y[test].var(0)).mean())
    for key in ASKED:
        y = np.array([thing[key] for _, thing in facts])
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500)).fit(x[~test], y[~test])
        out[key] = float((model.predict(x[test]) == y[test]).mean())
    return {**out, "n": int(test.sum()), **{f"n {key}": len(told[key]) for key in TOLD}}


@torch.no_grad()
def start_plainly(model: torch.nn.Module, seed: int) -> None:
    """Attention as SigLIP starts it: xavier, no bias."""
    for name, p in model.named_parameters():
        if ".self_attn." in name and p.ndim == 2:
            torch.nn.init.xavier_uniform_(p, generator=stream(seed, name))
        elif ".self_attn." in name:
            p.zero_()


def run(
    a: argparse.Namespace, arm: str, lr: float, seed: int, tokenizer: Tokenizer, means: Means, clips: Any
) -> dict[str, Any]:
    """Train one arm from nothing and probe its tower; seconds are those of the training."""
    stage = STAGES[arm.split(",")[0]]("tiny")
    if arm == "keye.s0_vit":  # as it is without a preparatory stage: both towers new, the text tower the slower
        stage = replace(stage, start=["scratch"], train={"*": 1.0, "text_model.*": 0.4})
    if arm == LARGE:
        stage = replace(stage, processor=None)
    if arm in PLACES:
        stage = replace(stage, objective=ObjectiveSpec("words", {**stage.objective.options, "places": PLACES[arm]}))
    optim = replace(stage.optim, lr=lr, warmup_steps=min(20, a.steps // 2))
    budget = replace(stage.budget, steps=a.steps, visual_tokens=512)
    stage = replace(stage, optim=optim, budget=budget, seed=seed).check()
    stage = replace(stage, checkpoint=Checkpoints(every_steps=0), log=Log(tensorboard=False))
    found: list[dict[str, Any]] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, load_data(stage, tokenizer, processor_of(stage), means) as loader:
        model = build(stage, tokenizer, means)
        if arm == PLAIN:
            start_plainly(model, seed)
        if arm == ALL:
            names = loader.plan.names
            names.rivals = lambda name: np.ones((len(name), len(names.words)), dtype=bool)  # type: ignore[method-assign]
        if arm == UNTRAINED:
            found.append({"seconds": 0.0, **measured(model.eval(), tokenizer, clips)})
        else:
            train(stage, folder, model=model, loader=loader, quiet=True,
                  hand_on=lambda _, model: found.append(
                      {"seconds": time.monotonic() - start, **measured(model.eval(), tokenizer, clips)}))  # fmt: skip
    said = ", ".join(f"{k} {found[0][k]:.2f}" for k in (*ASKED, "place", *TOLD))
    print(f"{arm} lr {lr:g} {a.steps} steps seed {seed}: {said}, {found[0]['seconds']:.0f} s", flush=True)
    return {"arm": arm, "lr": lr, "seed": seed, **found[0]}


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    about, lrs = harness.machine(), [float(lr) for lr in a.lrs.split(",")]
    clips = (things(a.world), moves(a.world))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = harness.world_tokenizer(a.world)
        means = Means({"world": a.world}, {}, cache=Path(folder), quiet=True)
        for arm in a.arms:
            grid = [run(a, arm, lr, 0, tokenizer, means, clips) for lr in lrs]
            best = max(grid, key=lambda r: r["shape"])["lr"]
            runs += grid + [run(a, arm, best, seed, tokenizer, means, clips) for seed in range(1, a.seeds)]
            for r in runs:
                r["best"] = r.get("best", False) or (r["arm"], r["lr"]) == (arm, best)
    rows, kept = [], {arm: [r for r in runs if r["arm"] == arm and r["best"]] for arm in a.arms}
    for arm, mine in kept.items():
        cells = [harness.shown(harness.spread([r[k] for r in mine])) for k in (*ASKED, "place", *TOLD)]
        rows.append((arm, f"{mine[0]['lr']:g}", *cells, f"{statistics.median(r['seconds'] for r in mine):.0f}"))
    one = kept[a.arms[0]][0]
    notes = [f"probe: {one['n']} things in the scored clips; a blind guess is right about once in six, six and four;"
             " place: R2, 1 is exact, 0 no better than the middle; an untrained tower has its table of places",
             "told: " + ", ".join(f"{one['n ' + k]} {k[6:]}" for k in TOLD)
             + "; keye.s0_vit learns no such words" * ("keye.s0_vit" in a.arms),
             "grid, shape with seed 0: " + ", ".join(f"{r['arm']} {r['lr']:g}: {r['shape']:.2f}" for r in runs
                                                     if r["seed"] == 0)]  # fmt: skip
    columns = ("taught by", "lr", *(f"probe, {k}" for k in (*ASKED, "place")), *TOLD, "seconds")
    title = f"a tiny tower after {a.steps} steps from nothing, {a.seeds} seeds: median (least to most)"
    return harness.report(a, title, about, columns, rows, {"runs": runs}, notes)


if __name__ == "__main__":
    harness.run(main)
