"""Make the whole world: jobs over processes, files and sources written in one order by one process."""

import csv
import io
import json
import math
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_mix.shards import ShardWriter
from data_mix.world import documents, kc, shop, stills, tasks, told
from data_mix.world.truth import make_brief, make_clip
from data_mix.world.words import (
    CLASSES,
    COLOUR_SHAPE,
    HELD_COLOUR_SHAPE,
    HELD_SHAPE_MOTION,
    VERSION,
)
from mm.common.errors import UserError
from mm.common.files import atomic_folder, read_json, write_json
from mm.common.progress import Progress
from mm.common.seeds import rng

SPLITS = ("seen", "unseen")
ALONE = {task: f"shop_{task.lower()}" for task in kc.TASKS if task != "CPV"}  # what is asked without follow-ups too
TEXTS = ("text", "text_chat", "verdicts", "told", "told_ask", "told_compare", "told_task", "told_shop")  # no media
SOURCES = (*stills.FAMILIES, "regions", "tracks", "video_caption", "video_qa", "motion", "reorder", "shop",
           *ALONE.values(), *TEXTS)  # fmt: skip


@dataclass(frozen=True)
class WorldSize:
    """How many of everything. `briefs`: silent training clips of the sampled frames alone, cheap and so many;
    `rows`: eval rows per task and split; `probe`: the same for split "train"; `most`: the largest
    number of samples of a source about clips; what is not named there has no limit."""

    clips: int
    briefs: int
    families: dict[str, int]
    shop: dict[str, int]
    text: int
    text_chat: int
    verdicts: int
    told: int
    told_ask: int
    told_compare: int
    told_task: int
    told_shop: int
    items: int
    users: int
    rows: int
    probe: int
    kc_rows: int
    kc_probe: int
    most: dict[str, int] = field(default_factory=lambda: {"reorder": 300, "motion": 300})
    shares: dict[str, float] = field(
        default_factory=lambda: {"video_caption": 0.35, "second": 0.45, "brief second": 0.65}
    )


def _families(n: int) -> dict[str, int]:
    shares = {
        "caption": 44, "vit_pairs": 60, "ocr": 24, "grounding": 12, "counting": 30, "vqa": 18, "interleaved": 10,
    }  # fmt: skip
    return {k: max(3, n * v // 100) for k, v in shares.items()}


def _shop(n: int) -> dict[str, int]:
    """Training rows of each KC task: the more the less one row tells."""
    shares = {"CPV": 1.5, "Video_Topic": 2, "Video_Order": 2, "PornComment": 1.5, "High_like": 4, "SPU": 3}
    return {task: int(n * share) for task, share in shares.items()}


WORLD_SIZES = {
    "micro": WorldSize(12, 6, _families(40), _shop(3), 40, 12, 9, 9, 9, 9, 9, 9, 6, 4, 6, 6, 2, 3, {"reorder": 6}),
    "tiny": WorldSize(1600, 3000, _families(5000), _shop(320), 3000, 9000, 900, 6000, 3000, 6000, 4000, 2400, 240,
                      300, 130, 250, 100, 160),
    "full": WorldSize(4800, 9000, _families(15000), _shop(960), 9000, 27000, 2700, 18000, 9000, 18000, 12000, 7200,
                      720, 900, 260, 500, 200, 200, {"reorder": 900, "motion": 900}),
}  # fmt: skip


def work(job: tuple) -> Any:
    """One job, a pure function of its arguments; runs in any process."""
    kind, seed, *a = job
    if kind == "clip":
        name, hero, second, split, number = a
        frames, mp4, truth = make_clip(seed, name, hero, second=second)
        truth = {"id": name, "split": split, **truth, **shop.clip_meta(seed, name, number, truth)}
        return name, mp4, truth, tasks.named_frames(seed, name, frames, truth) if split == "train" else []
    if kind == "brief":
        name, hero, second, family = a
        _, mp4, truth = make_brief(seed, name, hero, second=second)
        return name, mp4, tasks.clip_samples(seed, name, truth, family)
    if kind == "still":
        return stills.still_sample(seed, *a)
    if kind == "eval":
        return tasks.eval_still(seed, *a)
    if kind == "kc":
        return kc.kc_row(seed, *a)
    if kind == "item":
        return shop.make_item(seed, *a)
    make = {"text": documents.document, "text_chat": documents.chat, "verdicts": documents.verdicts,
            "told": told.told, "told_ask": told.told_ask, "told_compare": told.told_compare,
            "told_task": told.told_task, "told_shop": told.told_shop}[kind]
    return [make(seed, i) for i in range(*a)]


def _calm() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


class _Crew:
    """Runs jobs in order over processes (in this one where workers == 1)."""

    def __init__(self, workers: int, progress: Progress):
        self.progress = progress
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        self.pool = ProcessPoolExecutor(workers, context, initializer=_calm) if workers > 1 else None

    def run(self, jobs: list[tuple]) -> Iterator[Any]:
        results: Iterable[Any] = map(work, jobs) if self.pool is None else self.pool.map(work, jobs, chunksize=4)
        for result in results:
            self.progress.update()
            yield result

    def expect(self, more: int) -> None:
        """The number of jobs turned out otherwise than planned."""
        self.progress.total = (self.progress.total or 0) + more

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


class _World:
    """The folder being filled, its open sources, and what has been counted."""

    def __init__(self, root: Path, size: WorldSize, seed: int, crew: _Crew, stack: ExitStack):
        self.root, self.size, self.seed, self.crew = root, size, seed, crew
        self.sources = {
            n: stack.enter_context(ShardWriter(root / "sources" / n, n, version=VERSION)) for n in SOURCES
        }
        self.rows: dict[str, list[dict]] = {t: [] for t in tasks.EVAL_TASKS}
        self.train_clips: list[dict] = []
        self.items: list[dict] = []

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def lines(self, name: str, rows: Iterable[Any]) -> None:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        self.put(name, text.encode())

    # clips

    def clip(self, result: tuple) -> dict:
        name, mp4, truth, _ = result
        folder = "train" if truth["split"] == "train" else "test"
        self.put(f"clips/{folder}/{name}.mp4", mp4)
        self.put(f"clips/{folder}/{name}.json", json.dumps(truth, ensure_ascii=False).encode())
        return truth

    def train_clips_made(self) -> None:
        n, second = self.size.clips, rng(self.seed, "second").random(self.size.clips) < self.size.shares["second"]
        specs = tasks.clip_specs(self.seed, "train", n, second.tolist())
        jobs = [("clip", self.seed, *spec, "train", i) for i, spec in enumerate(specs)]
        captions = int(n * self.size.shares["video_caption"])
        for i, result in enumerate(self.crew.run(jobs)):
            truth = self.clip(result)
            family = "video_caption" if i % n < captions else "video_qa"
            for source, sample in tasks.clip_samples(self.seed, result[0], truth, family).items():
                self._clip_sample(source, result[0], sample, result[1])
            for key, sample, jpg in result[3]:
                self.sources["regions"].write(key, sample, {"0.jpg": jpg})
            hero = truth["things"][0]
            self.train_clips.append({"id": result[0], "thing": hero})
            self._clip_rows("train", f"clips/train/{result[0]}.mp4", truth, self.size.probe)

    def briefs_made(self) -> None:
        n, families = self.size.briefs, ("video_caption", "video_qa")
        second = rng(self.seed, "second", "brief").random(n) < self.size.shares["brief second"]
        specs = tasks.clip_specs(self.seed, "brief", n, second.tolist())
        jobs = [("brief", self.seed, *spec, families[i % 2]) for i, spec in enumerate(specs)]
        for name, mp4, samples in self.crew.run(jobs):
            for source, sample in samples.items():
                if source != "reorder":
                    self._clip_sample(source, name, sample, mp4)

    def _clip_sample(self, source: str, name: str, sample: dict, mp4: bytes) -> None:
        if len(self.sources[source]) < self.size.most.get(source, math.inf):
            self.sources[source].write(name, sample, {"mp4": mp4})

    def _clip_rows(self, split: str, media: str, truth: dict, limit: int) -> None:
        have = Counter(r["task"] for rows in self.rows.values() for r in rows if r["split"] == split)
        for row in tasks.clip_rows(self.seed, split, media, truth, 0):
            if have[row["task"]] < limit:
                self.rows[row["task"]].append({**row, "id": f"{row['task']}-{split}-{have[row['task']]:04d}"})
        counts = [r for r in self.rows["counting"] if r["split"] == split]
        found = tasks.clip_count_row(split, media, truth, len(counts))
        if found and sum(r["answer"] == found["answer"] for r in counts) < max(1, limit // 16):
            self.rows["counting"].append(found)

    def test_clips_made(self) -> None:
        """Per split: half a set where two act, half where one acts, half where two act again: the caption rows
        come from the first two halves, the order rows from all in which two act."""
        n = self.size.rows
        for split in SPLITS:
            second = [True] * (n // 2) + [False] * (n - n // 2) + [True] * (n - n // 2)
            specs = tasks.clip_specs(self.seed, split, len(second), second)
            jobs = [("clip", self.seed, *spec, split, i) for i, spec in enumerate(specs)]
            for result in self.crew.run(jobs):
                truth = self.clip(result)
                self._clip_rows(split, f"clips/test/{result[0]}.mp4", truth, n)

    # stills

    def train_stills_made(self) -> None:
        jobs = [("still", self.seed, f, i) for f, n in self.size.families.items() for i in range(n)]
        numbers = Counter[str]()
        for job, made in zip(jobs, self.crew.run(jobs), strict=True):
            family = job[2]
            self.sources[family].write(made["key"], made["sample"], made["media"])
            random = rng(self.seed, "regions", made["key"])
            if family != "interleaved" and (named := stills.regions_sample(made["truths"][0], random)):
                self.sources["regions"].write(made["key"], named, made["media"])
            if family in ("counting", "ocr", "grounding"):
                have = sum(r["split"] == "train" for r in self.rows[family])
                found = tasks.probe_row(family, made["sample"], made["truths"][0], numbers[family])
                if found and have < self.size.probe:
                    numbers[family] += 1
                    self.put(found[0], made["media"]["0.jpg"])
                    self.rows[family].append(found[1])

    def test_stills_made(self) -> None:
        for split in SPLITS:
            jobs = []
            for task in ("counting", "ocr", "grounding"):
                deck = tasks.Deck(rng(self.seed, "deck", task, split))
                pairs = HELD_COLOUR_SHAPE if split == "unseen" else COLOUR_SHAPE
                for i, k in enumerate(self._answers(task, split)):
                    jobs.append(("eval", self.seed, task, split, i, deck.draw(pairs), k))
            self.crew.expect(len(jobs) - 3 * self.size.rows)
            for made in self.crew.run(jobs):
                self.put(made["file"], made["jpg"])
                self.rows[made["row"]["task"]].append(made["row"])

    def _answers(self, task: str, split: str) -> list[int]:
        """For counting: what is missing until 1..5 come equally often; else as many as rows are wanted."""
        n = self.size.rows
        if task != "counting":
            return [0] * n
        have = Counter(int(r["answer"]) for r in self.rows[task] if r["split"] == split)
        out: list[int] = []
        while len(out) + sum(have.values()) < n:
            k = min(range(1, 6), key=lambda v: (have[v] + out.count(v), v))
            out.append(k)
        order = rng(self.seed, "counts", split).permutation(len(out))
        return [out[i] for i in order]

    # shop

    def shop_made(self) -> None:
        jobs = [("item", self.seed, i) for i in range(self.size.items)]
        for made in self.crew.run(jobs):
            for file, jpg in made["media"].items():
                self.put(f"items/{file}", jpg)
            self.put(f"items/{made['id']}.json", json.dumps(made["row"], ensure_ascii=False).encode())
            self.items.append({"id": made["id"], "thing": made["row"]["attributes"]})
        self.lines("users.jsonl", shop.make_users(self.seed, self.size.users, self.train_clips, self.items))

    def kc_made(self) -> None:
        tables: dict[str, list[list]] = {t: [] for t in kc.TASKS}
        jobs = [("kc", self.seed, t, "train", i) for t in kc.TASKS for i in range(self.size.shop[t])]
        jobs += [("kc", self.seed, t, s, i) for s in SPLITS for i in range(self.size.kc_rows) for t in kc.TASKS]
        for job, row in zip(jobs, self.crew.run(jobs), strict=True):
            task, split, number = job[2:]
            if split == "train":
                self._shop_sample(task, number, row)
            if split != "train" or number < self.size.kc_probe:
                tables[task].append(self._kc_line(task, split, number, row, len(tables[task])))
        for task, rows in tables.items():
            out = io.StringIO()
            writer = csv.writer(out, delimiter="\t", lineterminator="\n")
            writer.writerows([["index", "question", "answer", "image_path", "category"], *rows])
            self.put(f"kc/subsets/{task}.tsv", out.getvalue().encode())
        write_json(self.root / "kc" / "ceilings.json", {
            **kc.ceilings(), "unseen": kc.ceilings(HELD_COLOUR_SHAPE),
        })  # fmt: skip

    def _shop_sample(self, task: str, number: int, row: dict) -> None:
        media = {f"{i}.jpg": j for i, j in enumerate(row["images"])}
        parts = [{"type": "image", "image": name} for name in media]
        asked = {"type": task, "q": row["question"], "a": row["reply"]}
        more = kc.follow_ups(row, row["lang"], rng(self.seed, "shop", task, number))
        talks = {"shop": [asked, *more], **({ALONE[task]: [asked]} if task in ALONE else {})}
        for source, turns in talks.items():
            sample = stills.conversation(parts, turns, source, {"lang": row["lang"], **row["meta"]})
            sample["media"] = stills.media_facts(row["meta"]["truths"])
            self.sources[source].write(f"{task.lower()}-{number:05d}", sample, media)

    def _kc_line(self, task: str, split: str, number: int, row: dict, index: int) -> list:
        paths = [f"{task}/{split}-{number:04d}-{i}.jpg" for i in range(len(row["images"]))]
        for path, jpg in zip(paths, row["images"], strict=True):
            self.put(f"kc/images/{path}", jpg)
        return [index, row["question"], row["answer"], json.dumps(paths), f"{split}-{row['lang']}"]

    # text

    def text_made(self) -> None:
        for kind in TEXTS:
            n = getattr(self.size, kind)
            jobs = [(kind, self.seed, a, min(a + 100, n)) for a in range(0, n, 100)]
            samples = [s for part in self.crew.run(jobs) for s in part]
            for i, sample in enumerate(samples):
                self.sources[kind].write(f"{kind}-{i:06d}", sample, {})
            if kind in ("text", "text_chat"):
                self.lines(f"text/{kind}.jsonl", samples)

    def counts(self) -> dict[str, Any]:
        return {
            "clips": {"train": len(self.train_clips), "test": len(list((self.root / "clips/test").glob("*.mp4")))},
            "sources": {n: len(w) for n, w in self.sources.items()}, "items": len(self.items),
            "users": self.size.users,
            "eval": {t: dict(Counter(r["split"] for r in rows)) for t, rows in self.rows.items()},
            "kc": {"per_task_and_split": self.size.kc_rows, "train": self.size.kc_probe},
        }  # fmt: skip


def _jobs_in(size: WorldSize) -> int:
    tests = 2 * (size.rows // 2 + 2 * (size.rows - size.rows // 2))
    kc_jobs = sum(size.shop.values()) + 12 * size.kc_rows
    texts = sum(-(-getattr(size, kind) // 100) for kind in TEXTS)
    stills = sum(size.families.values()) + 6 * size.rows
    return size.clips + size.briefs + tests + stills + size.items + kc_jobs + texts


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _existing(folder: Path, size: str, seed: int) -> dict | None:
    """The world that is there already, if it is the one wanted. Raises UserError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "world.json").exists():
        raise UserError(f"{folder} holds something that is not a world; choose another folder")
    facts = read_json(folder / "world.json")
    have = (facts.get("version"), facts.get("size"), facts.get("seed"))
    if have != (VERSION, size, seed):
        raise UserError(
            f"{folder} is a world of version {have[0]}, size {have[1]}, seed {have[2]}, "
            f"not {VERSION}, {size}, {seed}; remove it or choose another folder"
        )
    return facts


def make_world(
    folder: str | Path, *, size: str = "tiny", seed: int = 0, workers: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Fill `folder` with the world of this size and seed (layout in `data_mix.world`); its world.json's content.

    The folder appears whole or not at all; one that holds the same world already is kept. Pictures and truth
    do not depend on `workers` (all cores by default).

    Raises UserError: unknown size; the folder holds something else.
    """
    folder = Path(folder)
    if size not in WORLD_SIZES:
        raise UserError(f"world size {size!r} is not known; use {', '.join(WORLD_SIZES)}")
    existing = _existing(folder, size, seed)
    if existing is not None:
        return existing
    workers = workers or _cores()
    start = time.monotonic()
    with atomic_folder(folder) as root, Progress(_jobs_in(WORLD_SIZES[size]), "world", quiet=quiet) as progress:
        facts = _fill(root, size, seed, workers, progress)
        total = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
        progress.note = f"{total / 1e6:.0f} MB in {time.monotonic() - start:.0f} s"
    return facts


def _fill(root: Path, size: str, seed: int, workers: int, progress: Progress) -> dict[str, Any]:
    crew = _Crew(workers, progress)
    try:
        with ExitStack() as stack:
            world = _World(root, WORLD_SIZES[size], seed, crew, stack)
            for part in (
                world.train_clips_made, world.briefs_made, world.test_clips_made, world.train_stills_made,
                world.test_stills_made, world.shop_made, world.kc_made, world.text_made,
            ):  # fmt: skip
                part()
    finally:
        crew.close()
    for task, rows in world.rows.items():
        world.lines(f"eval/{task}.jsonl", [{**r, "id": f"{task}-{r['split']}-{i:04d}"} for i, r in enumerate(rows)])
    facts = {
        "version": VERSION, "seed": seed, "size": size, "counts": world.counts(), "plan": asdict(world.size),
        "classes": {k: list(v) for k, v in CLASSES.items()},
        "held_out": {"colour_shape": [list(p) for p in HELD_COLOUR_SHAPE],
                     "shape_motion": [list(p) for p in HELD_SHAPE_MOTION],
                     "text_sources_name_them": True},
    }  # fmt: skip
    write_json(root / "world.json", facts)
    return facts
