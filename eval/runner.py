"""Asks a checkpoint every question once, keeps every answer, and scores them.

Jobs are distinct prompts (one caption serves colour, shape and motion). They go to ranks by stride, in
chunks; while one chunk is answered, a thread decodes the next. A call that was stopped goes on where
it was; media that cannot be read are skipped, counted and named.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval import responses
from eval.floors import blind, blind_key, colour_features, from_class, majority_classes, probe_answers
from eval.judge import Judge
from eval.responses import ResponseLog
from eval.scores import rescore
from eval.task import Item, Task, prompt_text
from mm.common import dist
from mm.common.errors import BadSample
from mm.common.progress import Progress

CHUNK = 64
PROBE_ROWS = 800


class Answerer(Protocol):
    """What the runner asks of a model; `eval.answer.Checkpoint` is one."""

    def example(self, messages: list[dict], root: Path) -> Any: ...
    def frames(self, messages: list[dict], root: Path) -> list[np.ndarray]: ...
    def answer(self, examples: list[Any], max_new_tokens: int) -> list[str]: ...


@dataclass
class Job:
    """One prompt and all (task, item) that want its answer."""

    messages: list[dict]
    root: Path
    max_new_tokens: int = 0
    wants: list[tuple[Task, Item]] = field(default_factory=list)

    @property
    def media(self) -> tuple[str, ...]:
        return tuple(self.wants[0][1].media)


@dataclass
class Options:
    """batch_size: sequences at once; batch_tokens: prompt tokens at once, whichever is reached first."""

    batch_size: int = 32
    batch_tokens: int = 16384
    blind: bool = True
    probe: bool = True
    judge: Judge | None = None
    quiet: bool = False


def run(model: Answerer, tasks: list[Task], out: str | Path, run_info: dict, options: Options) -> dict:
    """Answer what is not answered yet, fill in the floors, write scores.json; returns the scores."""
    start = time.monotonic()
    info = {
        **run_info,
        "tasks": [t.name for t in tasks],
        "floors_from": "train" if any(t.train for t in tasks) else "test",
    }
    with ResponseLog(out, info) as log:
        try:
            if dist.is_main():
                log.add([r for t in tasks for r in _bad_rows(t) if responses.key(r) not in log.rows])
            features = _answer_all(model, tasks, log, options)
            log.gather()
            train_features = _train_features(model, tasks, log, features, options) if options.probe else {}
            for rank_features in dist.gather_objects((features, train_features)):
                features.update(rank_features[0])
                train_features.update(rank_features[1])
            if dist.is_main():
                _majority(tasks, log)
                if options.probe:
                    _probe(tasks, log, features, train_features)
                if options.judge:
                    _judge(tasks, log, options.judge, options.quiet)
        except KeyboardInterrupt:
            if dist.is_main():
                print(f"\nstopped; {len(log.rows)} answers are kept in {out}, the same command goes on from there")
            raise
        finally:
            if dist.is_main():
                log.add([{"session": {"seconds": round(time.monotonic() - start, 2), "answers": log.fresh}}])
    dist.barrier()
    return dist.broadcast_object(rescore(out) if dist.is_main() else None)


# ---- answers


def _answer_all(model: Answerer, tasks: list[Task], log: ResponseLog, options: Options) -> dict:
    """Answers this rank's jobs; returns colour features by (root, media)."""
    variants = ("model", "blind") if options.blind else ("model",)
    jobs = [j for j in make_jobs(tasks) if any(_open(j, log, v) for v in variants)]
    jobs = _share(jobs)
    features: dict[tuple, np.ndarray] = {}
    greys: dict[str, str] = {}
    with Progress(len(jobs), "answers", quiet=options.quiet or not dist.is_main()) as progress:
        for ready in _prepared(model, jobs, features, options.probe):
            log.add([row for job, bad in ready if isinstance(bad, BadSample)
                     for row in _skipped_rows(job, bad, variants, log)])  # fmt: skip
            good = [(job, example) for job, example in ready if not isinstance(example, BadSample)]
            for batch in _batches(good, options):
                _answer_batch(model, batch, log, variants, greys)
                progress.update(len(batch), f"{len(log.rows)} rows")
            progress.update(len(ready) - len(good))
    return features


def make_jobs(tasks: list[Task]) -> list[Job]:
    """Distinct prompts, those about the same media side by side so that each is decoded once."""
    jobs: dict[tuple, Job] = {}
    for task in tasks:
        for item in task.items:
            job = jobs.setdefault((str(task.root), repr(item.messages)), Job(item.messages, task.root))
            job.wants.append((task, item))
            job.max_new_tokens = max(job.max_new_tokens, task.max_new_tokens)
    return sorted(jobs.values(), key=lambda j: (str(j.root), j.media))


def _share(jobs: list[Job]) -> list[Job]:
    """This rank's jobs: media go round, so that no two ranks decode one clip."""
    media = [(str(j.root), j.media) for j in jobs]
    turn = {m: i for i, m in enumerate(dict.fromkeys(media))}
    return [j for j, m in zip(jobs, media, strict=True) if turn[m] % dist.world_size() == dist.rank()]


def _open(job: Job, log: ResponseLog, variant: str) -> bool:
    return any(not log.answered((task.name, item.id, variant)) for task, item in job.wants)


def _prepared(model: Answerer, jobs: list[Job], features: dict, probe: bool) -> Iterator[list[tuple[Job, Any]]]:
    """Chunks of (job, example or BadSample); the next chunk is decoded while this one is answered."""

    def prepare(chunk: list[Job]) -> list[tuple[Job, Any]]:
        return [(job, _prepare(model, job, features, probe)) for job in chunk]

    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(prepare, chunks[0]) if chunks else None
        for i in range(len(chunks)):
            ready = pending.result() if pending else []
            pending = pool.submit(prepare, chunks[i + 1]) if i + 1 < len(chunks) else None
            yield ready


def _prepare(model: Answerer, job: Job, features: dict, probe: bool) -> Any:
    try:
        example = model.example(job.messages, job.root)
        if probe and (str(job.root), job.media) not in features:
            features[str(job.root), job.media] = colour_features(model.frames(job.messages, job.root))
        return example
    except BadSample as e:
        return e


def _batches(ready: list[tuple[Job, Any]], options: Options) -> Iterator[list[tuple[Job, Any]]]:
    """Jobs of like length together, so that nobody waits long for a neighbour."""
    batch: list[tuple[Job, Any]] = []
    for job, example in sorted(ready, key=lambda r: (r[0].max_new_tokens, len(r[1].input_ids))):
        full = len(batch) == options.batch_size
        tokens = (len(batch) + 1) * len(example.input_ids)
        if batch and (full or tokens > options.batch_tokens or batch[-1][0].max_new_tokens != job.max_new_tokens):
            yield batch
            batch = []
        batch.append((job, example))
    if batch:
        yield batch


def _answer_batch(
    model: Answerer, batch: list[tuple[Job, Any]], log: ResponseLog, variants: tuple[str, ...], greys: dict[str, str]
) -> None:
    cap = batch[0][0].max_new_tokens
    for variant in variants:
        todo = [(j, e) for j, e in batch if _open(j, log, variant)]
        if not todo:
            continue
        if variant == "model":
            answers = model.answer([e for _, e in todo], cap)
        else:
            answers = _blind_answers(model, [e for _, e in todo], cap, greys)
        log.add([_row(task, item, variant, answer) for (job, _), answer in zip(todo, answers, strict=True)
                 for task, item in job.wants])  # fmt: skip


def _blind_answers(model: Answerer, examples: list[Any], cap: int, greys: dict[str, str]) -> list[str]:
    """Questions that are equal without their pictures are asked once."""
    keys = [blind_key(e, cap) for e in examples]
    new = {k: e for k, e in zip(keys, examples, strict=True) if k not in greys}
    if new:
        greys.update(zip(new, model.answer([blind(e) for e in new.values()], cap), strict=True))
    return [greys[k] for k in keys]


def _row(task: Task, item: Item, variant: str, response: str) -> dict:
    parsed, score = task.check(item, response)
    return {
        **_about(task, item, variant), "response": response, "parsed": parsed, "score": score, "verdict_by": "rule",
        # whether a judge would have had the last word on this answer
        "unjudged": bool(variant == "model" and score < 1 and task.judge and task.judge(item, response, parsed)),
    }  # fmt: skip


def _about(task: Task, item: Item, variant: str) -> dict:
    return {
        "task": task.name, "id": item.id, "type": item.type, "split": item.split, "variant": variant,
        "prompt": prompt_text(item.messages), "media": item.media, "answer": item.answer,
        "choices": list(item.choices) if item.choices else None,
        "chance": task.chance_of(item), "ceiling": task.ceiling(item.split), "space": task.space,
    }  # fmt: skip


def _skipped_rows(job: Job, bad: BadSample, variants: tuple[str, ...], log: ResponseLog) -> list[dict]:
    rows = [{**_about(t, i, v), "skipped": bad.reason, "file": bad.key} for t, i in job.wants for v in variants[:1]]
    return [r for r in rows if log.rows.get((r["task"], r["id"], r["variant"]), {}).get("skipped") != r["skipped"]]


def _bad_rows(task: Task) -> list[dict]:
    return [{"task": task.name, "id": row, "type": "", "split": "", "variant": "model", "skipped": reason, "file": ""}
            for row, reason in task.bad]  # fmt: skip


# ---- floors


def _missing(task: Task, log: ResponseLog, variant: str) -> list[Item]:
    """Items the model answered and this floor did not yet."""
    return [i for i in task.items if log.answered((task.name, i.id, "model"))
            and not log.answered((task.name, i.id, variant))]  # fmt: skip


def _majority(tasks: list[Task], log: ResponseLog) -> None:
    for task in tasks:
        known = task.train or task.items
        classes = majority_classes(task, known)
        other = majority_classes(task, [replace(i, type="") for i in known]).get("", "")
        todo = _missing(task, log, "majority")
        log.add([_row(task, i, "majority", from_class(task, i, classes.get(i.type, other))) for i in todo])


def _train_features(
    model: Answerer, tasks: list[Task], log: ResponseLog, features: dict, options: Options
) -> dict[tuple, np.ndarray]:
    """Features of training rows, and of test items answered in an earlier call, this rank's share."""
    wanted = {}
    for task in tasks:
        if missing := _missing(task, log, "probe"):
            for item in [*_probe_train(task), *missing]:
                wanted[str(task.root), tuple(item.media)] = (item, task.root)
    todo = [(k, v) for k, v in sorted(wanted.items()) if k not in features][dist.rank() :: dist.world_size()]
    out: dict[tuple, np.ndarray] = {}
    with Progress(len(todo), "probe", quiet=options.quiet or not dist.is_main() or not todo) as progress:
        for k, (item, root) in todo:
            # A bad training row is a row less for a floor; test items were counted when they were asked.
            with contextlib.suppress(BadSample):
                out[k] = colour_features(model.frames(item.messages, root))
            progress.update()
    return out


def _probe_train(task: Task) -> list[Item]:
    return task.train[:: max(1, -(-len(task.train) // PROBE_ROWS))]


def _probe(tasks: list[Task], log: ResponseLog, features: dict, train_features: dict) -> None:
    known = {**train_features, **features}
    for task in tasks:
        at = lambda item, root=str(task.root): (root, tuple(item.media))
        test = [i for i in _missing(task, log, "probe") if at(i) in known]
        train = [i for i in _probe_train(task) if at(i) in known]
        if test:
            answers = probe_answers(task, train, [known[at(i)] for i in train], test, [known[at(i)] for i in test])
            log.add([_row(task, i, "probe", a) for i, a in zip(test, answers, strict=True)])


# ---- judge


def _judge(tasks: list[Task], log: ResponseLog, judge: Judge, quiet: bool) -> None:
    """Answers that the rule did not find right go to the judge, eight at a time."""
    asked = [question for task in tasks if task.judge for question in _undecided(task, log)]
    with ThreadPoolExecutor(8) as pool, Progress(len(asked), "judge", quiet=quiet) as progress:
        replies = pool.map(judge.ask, [a[3] for a in asked])
        for (task, item, row, _), reply in zip(asked, replies, strict=True):
            score = task.verdict(item, reply) if reply is not None and task.verdict else None
            if score is not None:
                log.add([{**row, "score": score, "verdict_by": judge.model, "judge_reply": reply, "unjudged": False}])
            progress.update()


def _undecided(task: Task, log: ResponseLog) -> Iterator[tuple[Task, Item, dict, str]]:
    for item in task.items:
        for variant in ("model", "blind"):
            row = log.rows.get((task.name, item.id, variant), {})
            if task.judge and row.get("verdict_by") == "rule" and row["score"] < 1:
                prompt = task.judge(item, row["response"], row["parsed"])
                if prompt:
                    yield task, item, row, prompt
