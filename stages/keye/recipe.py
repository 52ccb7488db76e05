"""Keye-VL's recipe as a pipeline, and the commands that run, show and plan it.

    world -> tokenizer -> text -> told -> told_compare -> told_tasks, words -> s0_vit -> s1_align -> s2_multitask
          (-> s2_practice, in long runs) -> s3_anneal_image, s3_anneal_video -> s3_merge -> eval

At small and 8b `world`, `tokenizer`, `text`, `told*`, `words` and `s2_practice` fall away: data come from --data, the
decoder from --qwen3, the tower from --siglip.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.pretty import pprint

from data_mix.world.make import make_world
from data_mix.world.words import VERSION
from eval.evaluate import evaluate_world
from eval.report import report
from eval.scores import print_scores
from mm.common import dist
from mm.common.config import nearest, override, to_dict
from mm.common.errors import UserError
from mm.common.files import read_json, write_json
from mm.common.progress import duration
from mm.merge import average
from stages import launch
from stages.engine import plan as planning
from stages.environment import cores, device_of, environment
from stages.keye import s0_vit, s1_align, s2_multitask, s2_practice, s3_anneal, text, told, words
from stages.keye.run import Means, empty, place_of, run_stage, texts_of, train_tokenizer
from stages.pipeline import Node, Pipeline, latest_run
from stages.stage import FREE, Stage

STAGES: dict[str, Callable[[str], Stage]] = {
    "keye.words": words.stage,  # towers before decoders: the road above, in the report's graph, that waits
    "keye.text": text.stage,
    "keye.s0_vit": s0_vit.stage,
    "keye.told": told.stage,
    "keye.told_compare": partial(told.stage, part="told_compare"),
    "keye.told_tasks": partial(told.stage, part="told_tasks"),
    "keye.s1_align": s1_align.stage,
    "keye.s2_multitask": s2_multitask.stage,
    "keye.s2_practice": s2_practice.stage,
    "keye.s3_anneal_image": partial(s3_anneal.stage, mixture="image"),
    "keye.s3_anneal_video": partial(s3_anneal.stage, mixture="video"),
}
TINY_ONLY = ("keye.text", *(n for n in STAGES if n.startswith("keye.told")), "keye.words", "keye.s2_practice")
LONG = 2  # from this --scale on, a run has the larger world, and s2_practice: there s2 has taught what that builds on
ENDS = {
    "text": "text", "told": "told_tasks", "s0": "s0_vit", "s1": "s1_align", "s2": "s2_multitask", "s3": "s3_merge",
}  # fmt: skip
ANNEALED = ("s3_anneal_image", "s3_anneal_video")
SCORED = ("s1", "s2", "s3")  # what can answer questions
GIVEN = {"world": "world.json", "qwen3": "config.json", "siglip": "config.json"}  # option -> what its folder holds


def name_of(what: str, *more: str) -> str:
    """A stage's full name from what was typed. Raises UserError, naming the nearest of the stages and `more`."""
    name = what if what in STAGES else f"keye.{what}"
    if name not in STAGES:
        raise UserError(f"{what!r} is not a stage{nearest(what, [*more, *STAGES])}")
    return name


def stage_of(name: str, a: argparse.Namespace, settings: list[str]) -> Stage:
    """The stage called `name` at the asked size, seed and scale, with its overrides."""
    if name in TINY_ONLY and a.size != "tiny":
        raise UserError(f"{name} is a stage of --size tiny alone; at {a.size} the recipe has none in its place")
    stage = replace(STAGES[name](a.size), seed=a.seed)
    if name.removeprefix("keye.") in ANNEALED and "keye.s2_practice" in stages_at(a.size, a.scale):
        stage = replace(stage, start=["s2_practice"])
    stage = replace(stage, budget=replace(stage.budget, steps=max(round(stage.budget.steps * a.scale), 1)))
    steps = override(stage, settings).budget.steps
    optim = replace(stage.optim, warmup_steps=min(stage.optim.warmup_steps, steps // 2))
    log = replace(stage.log, every_steps=max(steps // 40, 1))
    return override(replace(stage, optim=optim, log=log), settings).check()


def stages_at(size: str, scale: float) -> list[str]:
    """Full names of the recipe's stages at a size and scale, in order."""
    left_out = {"keye.s2_practice"} if scale < LONG else set()
    return [n for n in STAGES if n not in (left_out if size == "tiny" else TINY_ONLY)]


def settings_of(name: str, settings: list[str]) -> list[str]:
    """Of a pipeline's `--set s2_multitask.optim.lr=1e-4`, those of this stage, without its name."""
    return [s.removeprefix(f"{name}.") for s in settings if s.startswith(f"{name}.")]


def trained(stage: Stage, means: Means, needs: tuple[str, ...]) -> Node:
    """The node that trains `stage`; `means.artifacts` is filled from the node's inputs when it runs."""

    def go(folder: Path, inputs: dict[str, Path]) -> Path:
        return run_stage(stage, folder, replace(means, artifacts={**means.artifacts, **inputs}))

    params = {k: v for k, v in to_dict(stage).items() if k not in FREE}
    return Node(stage.name.removeprefix("keye."), go, needs, params, everywhere=True)


def keye(a: argparse.Namespace, folder: Path, means: Means) -> Pipeline:
    """All nodes up to `a.to`, and the score of the last model."""
    if a.to not in ENDS:
        raise UserError(f"--to {a.to}: not a stage{nearest(a.to, ENDS)}")
    tiny = a.size == "tiny"
    shorts = [n.removeprefix("keye.") for n in stages_at(a.size, a.scale)]
    begins = tuple(f"{short}." for short in shorts)
    wrong = [s for s in a.set if not s.split("=")[0].startswith(begins)]
    if wrong:
        raise UserError(f"--set {wrong[0]}: in a pipeline begin with one of its stages ({', '.join(shorts)}), e.g. "
                        "s2_multitask.optim.lr=1e-4")  # fmt: skip
    stages = [stage_of(f"keye.{short}", a, settings_of(short, a.set)) for short in shorts]
    known = {str(s.path) for stage in stages for s in stage.mix}
    if unknown := set(means.data) - known:
        raise UserError(f"--data {min(unknown)}: no stage has such a source{nearest(min(unknown), sorted(known))}")
    world_size = "tiny" if a.scale < LONG else "full"
    nodes = [
        Node("world", lambda f, _: _made(f, world_size, a),
             params={"size": world_size, "seed": a.seed, "version": VERSION}),
        Node("tokenizer", lambda f, i: train_tokenizer(_texts(i["world"]), f / "model"), ("world",)),
    ]
    given = {k: p for k in GIVEN if (p := getattr(a, k)) is not None}
    missing = [k for k in ("qwen3", "siglip") if not tiny and k not in given]
    if missing:
        raise UserError(f"--size {a.size} starts from published weights: give their local Hugging Face folders with "
                        + " and ".join(f"--{k} FOLDER" for k in missing))  # fmt: skip
    for stage in stages:
        needs = tuple(s for s in stage.start if s != "scratch") + (("world", "tokenizer") if tiny else ())
        mine = {name: path for name, path in means.data.items() if name in {str(s.path) for s in stage.mix}}
        nodes.append(trained(stage, replace(means, data=mine), needs))
    nodes.append(Node("s3_merge", lambda f, i: average([i[n] for n in ANNEALED], f / "model"), ANNEALED))
    if a.to in SCORED and not a.no_eval and (tiny or a.world):
        last = ENDS[a.to]
        nodes.append(Node("eval", lambda f, i: _scored(i[last], i["world"], f, a), (last, "world"), everywhere=True))
    pipeline = Pipeline([n for n in nodes if n.name not in given and (tiny or n.name not in ("world", "tokenizer"))],
                        folder, given=given)  # fmt: skip
    wanted = pipeline.needed(["eval"] if "eval" in pipeline.nodes else [ENDS[a.to]])
    if "world" in given:
        drawn = {str(s.path) for stage in stages if stage.name.removeprefix("keye.") in wanted for s in stage.mix}
        check_sources(given["world"], drawn, means)
    return Pipeline([pipeline.nodes[n] for n in wanted], folder, given=given)


def _made(folder: Path, size: str, a: argparse.Namespace) -> Path:
    make_world(folder / "world", size=size, seed=a.seed, quiet=a.quiet)
    return folder / "world"


def _texts(world: Path) -> Iterator[str]:
    return texts_of(sorted((world / "sources").iterdir()))


def _scored(model: Path, world: Path, folder: Path, a: argparse.Namespace) -> None:
    evaluate_world(model, world, folder, device=device_of(a.device), quiet=a.quiet)


# --- the commands ---------------------------------------------------------------------------------------


def run(a: argparse.Namespace) -> int:
    device = device_of(a.device)
    graph(a, device)  # a mistake is told once, before there are ranks
    if not launch.launched() and (ranks := a.ranks or ranks_here(a, device)) > 1:
        return launch.run(ranks, sys.argv[1:], threads=a.threads or 1)
    device = str(dist.init(device))
    if a.threads:
        torch.set_num_threads(a.threads)
    begun, pipeline, main = time.monotonic(), graph(a, device), dist.is_main()
    try:
        pipeline.run(quiet=a.quiet)
    finally:
        if main:
            write_record(pipeline, a)
        dist.shutdown()
    if main:
        finish(pipeline, pipeline.folder, time.monotonic() - begun)
    return 0


def graph(a: argparse.Namespace, device: str) -> Pipeline:
    """What `mm run` is to make."""
    check_given(a)
    if a.what == "keye" and a.source is not None:
        raise UserError(f"--from {a.source} is for one stage; a whole pipeline goes on in its own --out RUN, and is "
                        "given a world, a decoder or a tower by --world, --qwen3, --siglip")  # fmt: skip
    out = a.out or Path("runs") / a.what.replace(".", "-")
    means = Means({}, _pairs(a.data), cache=out / "cache", workers=a.workers, device=device, quiet=a.quiet)
    return keye(a, out, means) if a.what == "keye" else single(a, out, means)


def ranks_here(a: argparse.Namespace, device: str) -> int:
    """On a CPU as many ranks as its cores and the packs of a step allow: two threads of one rank gain little."""
    if device != "cpu":
        return 1
    if a.what == "keye":
        stages = [stage_of(n, a, settings_of(n.removeprefix("keye."), a.set)) for n in stages_at(a.size, a.scale)]
    else:
        stages = [stage_of(name_of(a.what), a, a.set)]
    packs = math.gcd(*(s.budget.packs_per_step for s in stages))
    return max(n for n in range(1, cores() + 1) if packs % n == 0)


def single(a: argparse.Namespace, out: Path, means: Means) -> Pipeline:
    """One stage alone, its inputs given, or from --from, or from the newest run that made them."""
    stage = stage_of(name_of(a.what, "keye"), a, a.set)
    wanted = [s for s in stage.start if s != "scratch"]
    optional = [] if {str(s.path) for s in stage.mix} <= set(means.data) else ["world"]
    tokenizer = ["tokenizer"] if a.size == "tiny" else []
    given = {name: find(name, a, out) for name in dict.fromkeys(wanted + optional + tokenizer)}
    return Pipeline([trained(stage, means, tuple(given))], out, given=given)


def find(name: str, a: argparse.Namespace, out: Path) -> Path:
    """Where an artifact is: an option of its name, the run after --from, or the newest run beside `out`."""
    if name in GIVEN and getattr(a, name) is not None:
        return getattr(a, name)
    if a.source is None:
        return latest_run(out.parent, name)
    done = a.source / name / "done.json"
    if done.exists():
        return done.parent / read_json(done)["artifact"]
    if (a.source / "config.json").exists() and name != "world":
        return a.source  # a model folder
    if (a.source / "pipeline.json").exists():  # what that run was given itself
        given = {n["name"]: n["path"] for n in read_json(a.source / "pipeline.json")["nodes"] if "path" in n}
        if name in given:
            return Path(given[name])
    other = f", or --{name} FOLDER" if name in GIVEN else ""
    raise UserError(f"{a.source} has not made {name!r}; give another --from RUN{other}")


def check_given(a: argparse.Namespace) -> None:
    """Raises UserError for a folder given as --NAME that does not hold what is wanted."""
    for name, mark in GIVEN.items():
        folder = getattr(a, name)
        if folder is not None and not (folder / mark).is_file():
            what = "a world (mm data make-world makes one)" if name == "world" else "a Hugging Face folder"
            raise UserError(f"--{name} {folder} is not {what}: it holds no {mark}")


def check_sources(world: Path, wanted: set[str], means: Means) -> None:
    """Raises UserError where sources that the stages draw from are neither given nor in the given world."""
    means = replace(means, artifacts={"world": world})
    if lacking := sorted(name for name in wanted if place_of(name, means) is None):
        raise UserError(f"--world {world} has no source {', '.join(lacking)}; it may be of another version (this is "
                        f"{VERSION}); `mm data make-world` makes one, or give --data {lacking[0]}=DIR")  # fmt: skip


def _pairs(settings: list[str]) -> dict[str, Path]:
    for s in settings:
        if "=" not in s:
            raise UserError(f"--data {s}: write it as NAME=FOLDER")
    return {s.split("=", 1)[0]: Path(s.split("=", 1)[1]) for s in settings}


def write_record(pipeline: Pipeline, a: argparse.Namespace) -> None:
    """RUN/pipeline.json: what a person (and the report) wants to know of the run as a whole."""
    status = {"done": "done", "given": "done", "interrupted": "failed"}
    nodes = [{"name": n, "inputs": list(pipeline.nodes[n].inputs), "seconds": pipeline.seconds(n),
              "status": status.get(pipeline.status(n), "waiting"), "note": ""} for n in pipeline.order]  # fmt: skip
    blank: dict = {"inputs": [], "seconds": None, "status": "done", "note": "given"}
    given: list[dict] = [{"name": n, **blank, "path": str(path.resolve())} for n, path in pipeline.given.items()]
    notes = {n: pipeline.folder / n / "skipped.json" for n in pipeline.order}
    skipped = {n: read_json(path) for n, path in notes.items() if path.exists()}
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    write_json(pipeline.folder / "pipeline.json", {
        "title": f"{a.what}, {a.size}", "command": shlex.join(["mm", *sys.argv[1:]]),
        "nodes": given + nodes, "environment": environment(), "skipped": skipped,
    })  # fmt: skip


def finish(pipeline: Pipeline, out: Path, seconds: float) -> None:
    if (out / "eval" / "scores.json").exists() and "eval" in pipeline.nodes:
        print_scores(read_json(out / "eval" / "scores.json"))
    page = report(out, out / "report.html")
    print(f"{duration(seconds)} in all; the report: {page}")


def show(a: argparse.Namespace) -> None:
    if a.what != "keye":
        pprint(stage_of(name_of(a.what, "keye"), a, a.set), expand_all=True)
        return
    a.to, a.no_eval, a.world, a.qwen3, a.siglip, a.quiet, a.device = "s3", False, None, None, None, True, "cpu"
    if a.size != "tiny":
        a.qwen3, a.siglip = Path("QWEN3_FOLDER"), Path("SIGLIP_FOLDER")
    out = a.out or Path("runs/keye")
    Console().print(keye(a, out, Means({}, {})).show())


def plan(a: argparse.Namespace) -> None:
    stage = stage_of(name_of(a.what), a, a.set)
    figures = planning.plan(stage, empty(stage), a.gpus, device=a.gpu, utilisation=a.utilisation)
    Console().print(planning.table(figures))
