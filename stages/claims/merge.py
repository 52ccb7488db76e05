"""keye.merge: the average of models annealed on different mixtures is at least as good as the best of them.

Published (Keye-VL report 1, section 3): pre-training ends with averaging the weights of models that were annealed
on different mixtures. Report 2 (1.5), table 7, for an OCR expert: base 78.25, expert 83.65, merged 84.51.

Here: one tiny model is trained for a short while on all families of the world's stills and its chats (shared by all
seeds; a seed is the data order of the annealing). From it two models are annealed to a rate of 0, one on a mixture
that leans to describing (caption, VQA, grounding), one to reading and counting (OCR, counting, text). Both and
their average (equal shares, `mm.merge`) answer held-out pictures of another world seed; a family weighs the same
as every other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_mix.mix import SourceSpec
from data_mix.shards import ShardWriter, Source
from data_mix.world import documents, stills
from mm import formats
from mm.batch import Batch
from mm.common.progress import Progress
from mm.keye import Keye
from mm.merge import average
from mm.processor import Processor
from mm.prompt import Example, join, prepare
from mm.sizes import PROCESSORS, SIZES
from mm.tokenizer import Tokenizer
from stages.claims.claim import Claim, Contrast, Lines, Row, Tick, constant, spread
from stages.engine.train import train
from stages.keye.run import Means, build, load_data, texts_of, train_tokenizer
from stages.stage import Budget, Checkpoints, Log, Optim, Stage

SEES = ("caption", "vqa", "grounding")
READS = ("ocr", "counting", "text_chat")
FAMILIES = (*SEES, *READS)
MODELS = ("describing", "reading", "average")
HELD_OUT_SEED = 1  # of the world the held-out samples come from; training has seed 0


@dataclass(frozen=True)
class Config:
    """samples per family; steps of the base and of each annealing; tokens per step; `lean`: the share of a
    mixture's tokens that goes to its own three families."""

    samples: int = 400
    held_out: int = 48
    base_steps: int = 300
    anneal_steps: int = 100
    tokens: int = 1024
    lean: float = 0.8
    base_lr: float = 3e-3
    anneal_lr: float = 2e-3


def mixture(own: tuple[str, ...], lean: float) -> list[SourceSpec]:
    rest = tuple(f for f in FAMILIES if f not in own)
    return [SourceSpec(f, lean / len(own)) for f in own] + [SourceSpec(f, (1 - lean) / len(rest)) for f in rest]


def stage(name: str, c: Config, *, steps: int, mix: list[SourceSpec], optim: Optim, start: str, seed: int) -> Stage:
    return Stage(
        name=f"claim.{name}", size="tiny", model=SIZES["tiny"], start=[start], train={"*": 1.0}, mix=mix, optim=optim,
        budget=Budget(tokens=c.tokens, visual_tokens=c.tokens * 3 // 4, steps=steps), precision="auto",
        checkpoint=Checkpoints(every_steps=0, keep=1, asynchronous=False), log=Log(tensorboard=False), seed=seed,
    )  # fmt: skip


def base_stage(c: Config) -> Stage:
    rule = Optim(name="muon", lr=c.base_lr, weight_decay=0.05, schedule="wsd", min_lr_ratio=0.5,
                 warmup_steps=min(20, c.base_steps // 4))  # fmt: skip
    equal = [SourceSpec(f, 1.0) for f in FAMILIES]
    return stage("base", c, steps=c.base_steps, mix=equal, optim=rule, start="scratch", seed=0)


def anneal_stage(c: Config, own: tuple[str, ...], name: str, seed: int) -> Stage:
    rule = Optim(name="muon", lr=c.anneal_lr, weight_decay=0.05, schedule="cosine", min_lr_ratio=0.0,
                 warmup_steps=min(10, c.anneal_steps // 4))  # fmt: skip
    return stage(name, c, steps=c.anneal_steps, mix=mixture(own, c.lean), optim=rule, start="base", seed=seed)


# --- shared by all seeds ------------------------------------------------------------------------------------


def get_ready(c: Config, folder: Path, quiet: bool) -> None:
    """Sources, tokenizer and base model in `folder`; what is there is kept."""
    for part, n, world_seed in (("train", c.samples, 0), ("held_out", c.held_out, HELD_OUT_SEED)):
        for family in FAMILIES:
            if not (folder / part / family / "source.json").exists():
                write_source(folder / part / family, family, n, world_seed, quiet)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(texts_of(folder / "train" / f for f in FAMILIES), folder / "tokenizer")
    with Progress(c.base_steps, "the model all start from", quiet=quiet) as progress:
        if not (folder / "base" / "model" / "config.json").exists():
            learn(base_stage(c), folder / "base", means(folder, folder), lambda: progress.update())


def write_source(folder: Path, family: str, n: int, world_seed: int, quiet: bool) -> None:
    with ShardWriter(folder, family) as writer, Progress(n, family, quiet=quiet) as progress:
        for i in range(n):
            if family == "text_chat":
                writer.write(f"{family}-{i:06d}", documents.chat(world_seed, i), {})
            else:
                made = stills.still_sample(world_seed, family, i)
                writer.write(made["key"], made["sample"], made["media"])
            progress.update()


def means(shared: Path, folder: Path) -> Means:
    artifacts = {"base": shared / "base" / "model", "tokenizer": shared / "tokenizer"}
    data = {f: shared / "train" / f for f in FAMILIES}
    return Means(artifacts, data, cache=shared / "cache", workers=0, quiet=True)


class Ticking:
    """A loader that ticks at every step it hands out."""

    def __init__(self, loader: Any, tick: Tick):
        self.loader, self.tick = loader, tick
        self.state, self.load = loader.state, loader.load

    def __iter__(self) -> Iterator[Any]:
        for step in self.loader:
            self.tick()
            yield step


def learn(stage: Stage, folder: Path, means: Means, tick: Tick) -> Path:
    """Train `stage` in `folder` by the engine; returns the model's folder."""
    tokenizer, processor = Tokenizer.load(means.artifacts["tokenizer"]), PROCESSORS["tiny"]
    model = build(stage, tokenizer, means)

    def hand_on(where: Path, whole: Any) -> None:
        formats.save(where, whole, processor, tokenizer)

    with load_data(stage, tokenizer, processor, means) as loader:
        return train(stage, folder, model=model, loader=Ticking(loader, tick), hand_on=hand_on, quiet=True)


# --- one seed -----------------------------------------------------------------------------------------------


def one_seed(c: Config, seed: int, folder: Path, tick: Tick) -> Row:
    """{"loss": {model: {family: nats a token}}, "accuracy": {model: {family: share of tokens}}, "distance": ...}."""
    shared, here = folder / "shared", folder / f"seed-{seed}"
    models = {}
    for name, own in (("describing", SEES), ("reading", READS)):
        models[name] = learn(anneal_stage(c, own, name, seed), here / name, means(shared, here), tick)
    models["average"] = average(list(models.values()), here / "average")
    row: Row = {"loss": {}, "accuracy": {}, "distance": distance(shared / "base" / "model", models)}
    held_out = [(f, batches(shared / "held_out" / f, models["average"], c.tokens)) for f in FAMILIES]
    for name, where in models.items():
        model = formats.load(where)[0]
        scores = {f: score(model, packs) for f, packs in held_out}
        row["loss"][name] = {f: s[0] for f, s in scores.items()}
        row["accuracy"][name] = {f: s[1] for f, s in scores.items()}
    return row


def distance(base: Path, models: dict[str, Path]) -> dict[str, float]:
    """Norms of differences between weights, as shares of the base's norm."""
    first = vector(base)
    a, b = vector(models["describing"]), vector(models["reading"])
    norm = first.norm()
    return {"apart": float((a - b).norm() / norm), "describing": float((a - first).norm() / norm),
            "reading": float((b - first).norm() / norm)}  # fmt: skip


def vector(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in formats.load(folder)[0].parameters()])


def batches(source: Path, checkpoint: Path, tokens: int) -> list[Batch]:
    """All samples of a source folder in order, joined up to about `tokens` tokens."""
    processor, tokenizer = Processor.load(checkpoint), Tokenizer.load(checkpoint)
    packs: list[list[Example]] = []
    have = Source(source)
    for i in range(len(have)):

        def load(part: dict[str, Any], i: int = i) -> tuple[np.ndarray, None]:
            return processor.load_image(have.member(i, part["image"])), None

        example = prepare(have.sample(i)["messages"], processor, tokenizer, load)
        if not packs or sum(len(e.input_ids) for e in packs[-1]) + len(example.input_ids) > tokens:
            packs.append([])
        packs[-1].append(example)
    return [join(p) for p in packs]


@torch.no_grad()
def score(model: Keye, packs: list[Batch]) -> tuple[float, float]:
    """Over all tokens of the answers: mean cross entropy (nats, fp32), share where the likeliest token is right."""
    loss, right, n = 0.0, 0, 0
    for batch in packs:
        rows = batch.target_mask().nonzero()[:, 0]
        logits, targets = model.logits(model(batch)[rows]), batch.input_ids[rows + 1]
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        right, n = right + int((logits.argmax(-1) == targets).sum()), n + len(rows)
    return loss / n, right / n


# --- what it says -------------------------------------------------------------------------------------------


def mean_of(row: Row, model: str, what: str = "loss", families: tuple[str, ...] = FAMILIES) -> float:
    return float(np.mean([row[what][model][f] for f in families]))


def best(row: Row) -> float:
    return min(mean_of(row, m) for m in MODELS[:2])


CONTRASTS = (
    Contrast("average - best of the two", "fall of the held-out loss (nats a token), all families alike",
             lambda r: best(r) - mean_of(r, "average"), decides=True),
    Contrast("average - best, accuracy", "share of answer tokens right, teacher-forced, all families alike",
             lambda r: mean_of(r, "average", "accuracy") - max(mean_of(r, m, "accuracy") for m in MODELS[:2])),
    Contrast("average - mean of the two", "fall of the held-out loss",
             lambda r: (mean_of(r, "describing") + mean_of(r, "reading")) / 2 - mean_of(r, "average")),
    Contrast("they specialise", "loss of the other - loss of the own model, on each mixture's own families",
             lambda r: (mean_of(r, "reading", families=SEES) - mean_of(r, "describing", families=SEES)
                        + mean_of(r, "describing", families=READS) - mean_of(r, "reading", families=READS)) / 2),
)  # fmt: skip


def table(rows: list[Row]) -> Lines:
    """Columns: loss over all families, over the describing ones, over the reading ones, token accuracy."""
    words = SIZES["tiny"].decoder.vocab_size
    lines: Lines = {"chance": constant(float(np.log(words)), 3) + constant(1 / words, 1)}
    for model in MODELS:
        of = [[mean_of(r, model, families=f) for r in rows] for f in (FAMILIES, SEES, READS)]
        lines[model] = [spread(v) for v in (*of, [mean_of(r, model, "accuracy") for r in rows])]
    return lines


def notes(rows: list[Row]) -> list[str]:
    far = {k: float(np.mean([r["distance"][k] for r in rows])) for k in rows[0]["distance"]}
    return [
        f"the two models lie {far['apart']:.1%} of the base's norm apart (from the base: {far['describing']:.1%} and "
        f"{far['reading']:.1%})",
        "all seeds start from one base model; a seed is the data order of both annealings",
    ]


CLAIM = Claim(
    name="keye.merge",
    says="the average of models annealed on different mixtures is at least as good as the best of them",
    source="Keye-VL report 1 (arXiv 2507.01949), section 3; 1.5 report, table 7",
    cost="5 seeds: about 7 minutes on two idle cores",
    config=Config(), prepare=get_ready, seed=one_seed, steps=lambda c: 2 * c.anneal_steps, contrasts=CONTRASTS,
    unit="loss in nats a token; accuracy", columns=("loss", "loss describing", "loss reading", "accuracy"),
    table=table, notes=notes, plotted=3, dashed=(), hidden=("chance",),
)  # fmt: skip
