"""A checkpoint folder in, `responses.jsonl` and `scores.json` out: the two benchmarks as calls."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval import kc_mmbench, world
from eval.answer import Checkpoint
from eval.judge import Judge
from eval.runner import Options, run
from eval.task import TEST_SPLITS, choose
from mm.common import dist
from mm.common.files import read_json


def evaluate_world(
    checkpoint_folder: str | Path, world_folder: str | Path, out: str | Path, *,
    splits: Sequence[str] = ("seen", "unseen"), tasks: Sequence[str] | None = None, limit: int | None = None,
    batch_size: int = 32, blind: bool = True, probe: bool = True, kc: bool = True, device: str = "cpu",
    quiet: bool = False,
) -> dict:  # fmt: skip
    """Answer, score, write `out`/responses.jsonl and `out`/scores.json; returns the scores.

    Args:
        tasks: names to keep (all by default); limit: items per task and split, evenly spaced.
    Raises: UserError for an unknown task or split, a folder that is no world or no checkpoint.
    """
    facts = read_json(Path(world_folder) / "world.json")
    chosen = choose(world.load_tasks(world_folder, splits=splits, kc=kc), tasks, limit)
    info = {
        "benchmark": "world", "data": str(world_folder), "data_version": facts.get("version"),
        "data_fingerprint": f"world-{facts.get('version')}-{facts.get('size')}-{facts.get('seed')}",
    }  # fmt: skip
    model = Checkpoint(checkpoint_folder, device=device)
    options = Options(batch_size=batch_size, blind=blind, probe=probe, quiet=quiet)
    return run(model, chosen, out, {**info, **_about(model, splits)}, options)


def evaluate_kc(
    checkpoint_folder: str | Path, data_folder: str | Path, out: str | Path, *, judge: Judge | None = None,
    tasks: Sequence[str] | None = None, limit: int | None = None, batch_size: int = 16,
    max_new_tokens: int | None = None, blind: bool = True, probe: bool = True, device: str = "cpu",
    quiet: bool = False,
) -> dict:  # fmt: skip
    """KC-MMBench on a checkpoint; writes `out`/responses.jsonl, scores.json (and judge.jsonl); returns the scores.

    Args:
        judge: who decides what the rules cannot; None: exact match, and the scores say so.
        max_new_tokens: for all tasks, e.g. 2048 for a model that thinks first; by default each task's own.
    """
    root = Path(data_folder)
    model = Checkpoint(checkpoint_folder, device=device)
    chosen = [
        replace(t, max_new_tokens=max_new_tokens or t.max_new_tokens)
        for t in choose(kc_mmbench.load_tasks(root, splits=TEST_SPLITS), tasks, limit)
    ]
    info = {
        "benchmark": "KC-MMBench", "data": str(root), "data_fingerprint": _fingerprint(root),
        "judge": judge.model if judge else None, "judge_url": judge.url if judge else None,
    }  # fmt: skip
    if judge and judge.cache is None:
        judge.cache_in(Path(out) / "judge.jsonl")
    options = Options(batch_size=batch_size, blind=blind, probe=probe, judge=judge, quiet=quiet)
    return run(model, chosen, out, {**info, **_about(model, TEST_SPLITS)}, options)


def _about(model: Checkpoint, splits: Sequence[str]) -> dict:
    """The run line's share that every benchmark has."""
    return {
        "checkpoint": str(model.folder), "checkpoint_fingerprint": model.fingerprint(),
        "processor": model.processor.hash, "splits": list(splits), "ranks": dist.world_size(),
    }  # fmt: skip


def _fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((root / "subsets").glob("*.tsv")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
