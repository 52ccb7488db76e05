"""Whose mistakes they are: what a model makes of the world's test clips and covers, drawn and told.

A told clip or picture (`mm/told.py`) is what a tower and a projector without a mistake would give of it: at each
place the decoder's own embeddings of the words for what lies there. What a model gets wrong of what is told is its
decoder's mistake; what it gets right, and wrong of the same drawn, was lost before the decoder. After `told_tasks` no
stage tells anything any more, so a decoder may forget some of how to listen.

    python benchmarks/blame.py --run runs/quickstart
"""

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from data_mix.assemble import told_frames
from data_mix.world import kc
from data_mix.world.told import in_boxes
from eval import kc_mmbench, world
from eval.answer import Checkpoint, Media
from eval.runner import Options, run
from eval.task import choose
from mm.common.errors import UserError
from mm.common.files import read_json
from mm.processor import Processor
from mm.tokenizer import Tokenizer
from mm.told import Told

MODELS = ("told_tasks", "s1_align", "s2_multitask", "s3_merge")
TASKS = ("caption_colour", "caption_shape", "caption_motion", "order", *(s.name for s in kc_mmbench.SUBSETS))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--run", type=Path, required=True, help="a run that has a world and some of these models")
    p.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="; ".join(MODELS))
    p.add_argument("--limit", type=int, help="test questions of each task and split (default: all)")
    return p.parse_args(argv)


@functools.cache
def cover_row(seed: int, task: str, split: str, number: int) -> dict[str, Any]:
    """A row of the world's KC tasks, made once more: the world keeps no truth of its pictures."""
    return kc.kc_row(seed, task, split, number)


def truth_of(path: Path) -> dict:
    """The truth of a test clip, or of a picture of the world's KC tasks (kc/images/TASK/SPLIT-NUMBER-PICTURE.jpg).
    Raises UserError for a picture that this version of the world would not draw so."""
    if path.suffix == ".mp4":
        return read_json(path.with_suffix(".json"))
    split, number, picture = path.stem.split("-")
    seed = read_json(path.parents[3] / "world.json")["seed"]
    row, i = cover_row(seed, path.parent.name, split, int(number)), int(picture)
    if row["images"][i] != path.read_bytes():
        raise UserError(f"{path} is of another version of the world, so its truth is not known; make the world again")
    return row["meta"]["truths"][i]


class TellingMedia(Media):
    """The frames of what a world's test questions show spell what its truth says of them."""

    def __init__(self, processor: Processor, tokenizer: Tokenizer):
        super().__init__(processor)
        self.processor, self.tokenizer = processor, tokenizer

    def _read(self, kind: str, root: Path, path: Path, name: str) -> tuple[np.ndarray, Any]:
        frames, plan = super()._read(kind, root, path, name)
        truth = truth_of(path)
        said = in_boxes(truth, list(range(len(truth["times"]))))
        return told_frames(said, frames.shape[:3], plan, self.processor, self.tokenizer), plan


class Listener(Checkpoint):
    """A checkpoint that is told what it would be shown."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        told = Told(self.model.config)
        told.load_state_dict(self.model.state_dict())
        self.model, self.media = told.eval(), TellingMedia(self.processor, self.tokenizer)


def answered(kind: type[Checkpoint], folder: Path, a: argparse.Namespace) -> dict[str, Any]:
    """{"task/split": score} of one model, told or shown."""
    tasks = choose(world.load_tasks(a.run / "world" / "world"), TASKS, a.limit)
    with tempfile.TemporaryDirectory() as out:
        scores = run(kind(folder), tasks, out, {}, Options(blind=False, probe=False, quiet=True))
    return scores["tasks"]


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    if not (a.run / "world" / "world").exists():
        raise UserError(f"--run {a.run} has not made 'world'; make it with: mm run keye --size tiny")
    about, found = harness.machine(), [m for m in a.models or MODELS if (a.run / m / "model").is_dir()]
    if missing := [m for m in a.models or () if m not in found] or ([] if found else list(MODELS)):
        raise UserError(f"--run {a.run} has no model of {', '.join(missing)}; make one with: mm run keye --size tiny")
    runs: list[dict[str, Any]] = []
    for name in found:
        for how, kind in (("told", Listener), ("drawn", Checkpoint)):
            if name == "told_tasks" and how == "drawn":  # its projector has learnt nothing
                continue
            scores = answered(kind, a.run / name / "model", a)
            values = {key: {k: score[k] for k in ("value", "ci95", "n")} for key, score in scores.items()}
            runs.append({"model": name, "shown": how, "values": values})
            print(f"{name}, {how}:", *(f"{k} {v['value']:.2f}" for k, v in values.items()), flush=True)
    rows = [(key, *(cell(r["values"][key]) for r in runs), value["n"]) for key, value in runs[0]["values"].items()]
    columns = ("task", *(f"{r['model']}, {r['shown']}" for r in runs), "n")
    notes = ["one run; 95 % intervals are Wilson's, over questions"]
    return harness.report(a, "test questions told and drawn", about, columns, rows, {"runs": runs}, notes)


def cell(value: dict[str, Any]) -> str:
    return f"{value['value']:.2f} ({value['ci95'][0]:.2f} to {value['ci95'][1]:.2f})"


if __name__ == "__main__":
    harness.run(main)
