"""From a stage's page to a finished run: tokenizer, weights to start from, data, then the engine."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.shards import Source
from data_mix.world.words import CLASSES, ZH
from mm import formats
from mm.common import dist
from mm.common.config import nearest
from mm.common.errors import UserError
from mm.common.files import atomic_folder, read_json, read_jsonl, write_json
from mm.keye import Keye, KeyeConfig
from mm.processor import Processor
from mm.sizes import PROCESSORS
from mm.template import DEFAULT_SYSTEM
from mm.tokenizer import ANSWER, Tokenizer
from mm.told import Aligned, Told
from stages import objectives
from stages.engine.log import open_append, write_line
from stages.engine.train import train
from stages.stage import Stage
from vision.text_tower import ContrastiveModel, TextTower
from vision.vit import VisionTower

VOCABULARY = 2048  # of the tokenizer that tiny trains on the world's text


@dataclass(frozen=True)
class Means:
    """What a run is given besides the stage: where artifacts and data lie, and how to work.

    artifacts: name -> folder (world, tokenizer, text, s0_vit, ..., or qwen3 and siglip given by the user).
    data: source name -> source folder, for those that do not come from the world.
    """

    artifacts: dict[str, Path]
    data: dict[str, Path]
    cache: Path | None = None
    workers: int = 1
    device: str = "cpu"
    quiet: bool = False

    def artifact(self, name: str, needed_by: str) -> Path:
        if name not in self.artifacts:
            raise UserError(
                f"{needed_by} starts from {name!r}, which is not here: run the stage that makes it, name a run with "
                f"--from, or (qwen3, siglip) give a local Hugging Face folder with --{name} FOLDER"
            )
        return self.artifacts[name]


def train_tokenizer(texts: Iterable[str], folder: Path) -> Path:
    """A byte-level BPE over these texts, with Keye's special tokens, saved in `folder`."""
    with atomic_folder(folder) as temporary:
        Tokenizer.train(texts, VOCABULARY).save(temporary)
    return folder


def texts_of(folders: Iterable[Path]) -> Iterator[str]:
    """All that is said in these source folders, with what the template says around it, without the marks that are
    tokens of their own, and with each Chinese word of the world's names by itself. Chinese has no blanks: in so few
    texts "blue glass cube" would become one piece, in which no part can be told from another."""
    words = sorted((ZH[word] for kind in CLASSES.values() for word in kind), key=len, reverse=True)
    cut = re.compile("|".join(map(re.escape, sorted(ANSWER))) + f"|({'|'.join(words)})")
    for folder in folders:
        source = Source(folder)
        for i in range(len(source)):
            messages = source.sample(i)["messages"]
            if messages[0]["role"] not in ("text", "system"):
                yield f"system\n{DEFAULT_SYSTEM}"
            for message in messages:
                yield f"{message['role']}\n"
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                yield from (t for p in parts if p["type"] == "text" for t in cut.split(p["text"]) if t)


def tokenizer_of(stage: Stage, means: Means) -> Tokenizer:
    """The tokenizer of whatever the stage starts from; at tiny the one trained on the world."""
    for name in (*stage.start, "tokenizer", "qwen3"):
        folder = means.artifacts.get(name)
        if folder is not None and (folder / "tokenizer.json").exists():
            return Tokenizer.load(folder)
    raise UserError(f"{stage.name}: none of {', '.join(stage.start)} holds a tokenizer.json; give --qwen3 FOLDER")


def processor_of(stage: Stage) -> Processor:
    return stage.processor or PROCESSORS[stage.size]


def empty(stage: Stage) -> Keye | ContrastiveModel:
    """The stage's model on the meta device: every shape, no memory."""
    with torch.device("meta"):
        return _construct(stage)


def _construct(stage: Stage) -> Keye | ContrastiveModel:
    if isinstance(stage.model, KeyeConfig):
        return {"told": Told, "regions": Aligned}.get(objectives.make(stage.objective).kind, Keye)(stage.model)
    return ContrastiveModel(VisionTower(stage.model.vision), TextTower(stage.model.text))


def build(stage: Stage, tokenizer: Tokenizer, means: Means) -> Keye | ContrastiveModel:
    """The model with fresh weights, then what it starts from laid over them in order, strictly by name."""
    if isinstance(stage.model, KeyeConfig):
        stage = replace(stage, model=stage.model.bound(tokenizer))
    elif tokenizer.vocab_size > stage.model.text.vocab_size:
        raise UserError(
            f"{stage.name}: the tokenizer has {tokenizer.vocab_size} entries, model.text.vocab_size is "
            f"{stage.model.text.vocab_size}; the text tower needs the tokenizer it was made with"
        )
    model = _construct(stage)
    model.init_weights(stage.seed)
    for name in stage.start:
        if name != "scratch":
            lay_over(model, means.artifact(name, stage.name))
    return model


def lay_over(model: Keye | ContrastiveModel, folder: Path) -> None:
    """Weights of a Qwen3, SigLIP or Keye folder into the parts of `model` that they are for."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "siglip":
        formats.load_siglip(model, folder)
    elif kind == "qwen3" and isinstance(model, Keye):
        formats.load_qwen3(model, folder)
    elif kind in ("Keye", "KeyeVL1_5") and isinstance(model, Keye):
        formats.fill_keye(model, folder)
    else:
        raise UserError(f"{folder}: a {kind!r} checkpoint has no part in a {type(model).__name__}")


def place_of(source: str, means: Means) -> Path | None:
    """Its folder: given by the user, a folder of that path, or the world's."""
    world = means.artifacts.get("world")
    places = [means.data.get(source), Path(source), world / "sources" / source if world else None]
    return next((p for p in places if p is not None and (p / "source.json").exists()), None)


def sources(stage: Stage, means: Means) -> list[SourceSpec]:
    """The stage's mix with every name resolved by `place_of`."""
    unknown = set(means.data) - {str(s.path) for s in stage.mix}
    if unknown:
        name, known = min(unknown), [str(s.path) for s in stage.mix]
        raise UserError(f"--data {name}: {stage.name} has no such source{nearest(name, known)}")
    found = []
    for spec in stage.mix:
        name = str(spec.path)
        place = place_of(name, means)
        if place is None:
            raise UserError(f"{stage.name}: source {name!r} is not here; give it with --data {name}=FOLDER")
        found.append(replace(spec, path=str(place)))
    return found


def load_data(
    stage: Stage, tokenizer: Tokenizer, processor: Processor, means: Means,
    on_bad: Callable[[str, str], None] = lambda name, reason: None,
) -> Loader:  # fmt: skip
    plan = PackPlan(
        Mix(sources(stage, means), stage.seed), processor, tokenizer, stage.budget.tokens, stage.budget.visual_tokens,
        stage.seed, kind=objectives.make(stage.objective).kind, alike=stage.budget.packs_per_step,
    )  # fmt: skip
    return Loader(
        plan, packs_per_step=stage.budget.packs_per_step, rank=dist.rank(), ranks=dist.world_size(),
        workers=means.workers, cache_dir=means.cache, deadline=stage.data.deadline, max_bad=stage.data.max_bad,
        on_bad=on_bad,
    )  # fmt: skip


def run_stage(stage: Stage, folder: Path, means: Means) -> Path:
    """Train `stage` in `folder`; returns the folder of the model it hands on. Raises as the engine does.

    `folder`/skipped-rank*.jsonl names each sample that gave no data when it was drawn; skipped.json counts those of
    all attempts, and the samples that could never be drawn, by reason.
    """
    tokenizer, processor = tokenizer_of(stage, means), processor_of(stage)
    model = build(stage, tokenizer, means)

    def hand_on(where: Path, whole: Any) -> None:
        formats.save(where, whole, processor, tokenizer)

    named = open_append(folder / f"skipped-rank{dist.rank()}.jsonl")

    def on_bad(name: str, reason: str) -> None:
        write_line(named, {"sample": name, "reason": reason})

    with named, load_data(stage, tokenizer, processor, means, on_bad) as loader:
        made = train(
            stage, folder, model=model, loader=loader, hand_on=hand_on, device=means.device, quiet=means.quiet
        )
        never = Counter(b.reason for b in loader.plan.refused)
    dist.barrier()
    if dist.is_main():
        write_json(folder / "skipped.json", dict(never + skipped(folder)))
    return made


def skipped(folder: Path) -> Counter[str]:
    """Reason -> samples that gave no data; one that was drawn again after an interruption counts once."""
    rows = [row for path in sorted(folder.glob("skipped-rank*.jsonl")) for row in read_jsonl(path)]
    return Counter({row["sample"]: row["reason"] for row in rows}.values())
