"""`mm eval` and `mm chat`: a checkpoint or a run folder in, scores or answers out."""

import argparse
from pathlib import Path

from eval.evaluate import evaluate_kc, evaluate_world
from eval.judge import Judge
from eval.scores import print_scores
from mm.common import dist
from mm.common.errors import UserError
from stages.environment import device_of
from stages.pipeline import last_model


def checkpoint_of(path: Path) -> Path:
    """A model folder as it is; of a run folder, the last model it handed on."""
    if (path / "config.json").exists() and (path / "tokenizer.json").exists():
        return path
    found = last_model(path)
    if found is None:
        raise UserError(f"{path} is neither a model folder nor a run that has handed one on")
    return found


def world_of(run: Path) -> Path | None:
    """The world a run was trained on, if it made one."""
    world = run / "world" / "world"
    return world if (world / "world.json").exists() else None


def evaluate(a: argparse.Namespace) -> None:
    device = device_of(a.device)
    dist.init(device)
    checkpoint = checkpoint_of(a.checkpoint)
    tasks = a.tasks.split(",") if a.tasks else None
    out = a.out or a.checkpoint / f"eval-{a.benchmark}"
    if a.benchmark == "world":
        data = a.data or world_of(a.checkpoint)
        if data is None:
            raise UserError("which world? give --data FOLDER (mm data make-world makes one)")
        result = evaluate_world(checkpoint, data, out, tasks=tasks, limit=a.limit, batch_size=a.batch_size,
                                blind=not a.no_blind, device=device)  # fmt: skip
    else:
        if a.data is None:
            raise UserError("--data FOLDER is missing: the KC-MMBench folder with subsets/*.tsv and images/")
        judge = Judge(url=a.judge_url, model=a.judge_model, api_key=a.judge_key or None) if a.judge_url else None
        result = evaluate_kc(checkpoint, a.data, out, judge=judge, tasks=tasks, limit=a.limit,
                             batch_size=a.batch_size, max_new_tokens=a.max_new_tokens, blind=not a.no_blind,
                             device=device)  # fmt: skip
    if dist.is_main():
        print_scores(result)
        print(f"every answer: {out}/responses.jsonl")


def chat(a: argparse.Namespace) -> None:
    from eval.chat import chat, media_of

    answer = chat(
        checkpoint_of(a.checkpoint), media_of([str(p) for p in a.image], [str(p) for p in a.video]), a.question,
        max_new_tokens=a.max_new_tokens, temperature=a.temperature, device=device_of(a.device),
    )  # fmt: skip
    del answer
