"""The bundled world's benchmark: seven tasks on held-out clips and the six shaped like KC-MMBench.

    WORLD/eval/{caption_colour,caption_shape,caption_motion,counting,ocr,order,grounding}.jsonl
    WORLD/kc/{subsets,images,ceilings.json}

Split "seen": new clips of pairs (colour with shape, shape with motion) that training showed;
"unseen": pairs it held out; "train": training clips, for the floors alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval import kc_mmbench, scorers
from eval.floors import chance_box, chance_choices, chance_open, chance_order
from eval.task import Item, Task, read_items
from mm.common.config import nearest
from mm.common.errors import UserError

CAPTIONS = ("caption_colour", "caption_shape", "caption_motion")
TASKS = (*CAPTIONS, "counting", "ocr", "order", "grounding")
SPLITS = ("seen", "unseen")
IOU_THRESHOLD = 0.5


def load_tasks(world: str | Path, *, splits: Sequence[str] = SPLITS, kc: bool = True) -> list[Task]:
    """Tasks of a world folder. Raises UserError where it is none, or a task's file is missing."""
    root = Path(world)
    if not (root / "world.json").exists():
        raise UserError(f"{world} is no world (no world.json); make one with `mm data make-world {world}`")
    if wrong := [s for s in splits if s not in SPLITS]:
        raise UserError(f"splits: {wrong[0]!r} is not known{nearest(wrong[0], SPLITS)}")
    rows = {name: read_items(_file(root, name)) for name in TASKS}
    nouns = sorted({c for item in rows["caption_shape"] for c in item.choices or ()})
    tasks = [_task(name, items, root, splits, nouns) for name, items in rows.items()]
    if kc and (root / "kc").is_dir():
        tasks += kc_mmbench.load_tasks(root / "kc", splits=splits)
    return tasks


def _file(root: Path, name: str) -> Path:
    path = root / "eval" / f"{name}.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing; make the world again with `mm data make-world {root}`")
    return path


def _task(name: str, rows: list[Item], root: Path, splits: Sequence[str], nouns: list[str]) -> Task:
    parse, score, chance, cap, space = _rules(name, nouns)
    return Task(
        name, [r for r in rows if r.split in splits], [r for r in rows if r.split == "train"], root,
        parse, score, chance, max_new_tokens=cap, space=space,
    )  # fmt: skip


def _rules(name: str, nouns: list[str]) -> tuple[Callable, Callable, Callable, int, str]:
    """(parse, score, chance, cap on new tokens, answer space) of one task."""
    if name in CAPTIONS:
        return (
            lambda text, item: first_object(name, text, item.choices or (), nouns),
            same,
            chance_choices,
            40,
            "closed",
        )
    if name == "counting":
        return lambda text, item: scorers.parse_count(text), same_count, chance_choices, 16, "closed"
    if name == "ocr":
        return lambda text, item: scorers.normalise(scorers.strip_tags(text)) or None, same, chance_open, 16, "open"
    if name == "order":
        return parse_order, score_order, chance_of_order, 16, "closed"
    return lambda text, item: scorers.parse_box(text), score_box, box_chance, 48, "open"


def first_object(task: str, caption: str, choices: Sequence[str], nouns: Sequence[str]) -> str | None:
    """The attribute a caption gives its first object, or None where it leaves it out.

    Colour: the last one said before the first shape; motion: the first one said after it and before
    the next shape. A caption without any shape (a bare word) gives the first choice it mentions.
    """
    said = scorers.mentions(caption, nouns)
    if not said or task == "caption_shape":
        return scorers.first_choice(caption, choices)
    first = said[0][0]
    if task == "caption_colour":
        found = scorers.mentions(caption[:first], choices)
        return found[-1][1] if found else None
    following = said[1][0] if len(said) > 1 else None
    return scorers.first_choice(caption[first:following], choices)


def same(item: Item, parsed: Any) -> float:
    return float(scorers.normalise(str(parsed)) == scorers.normalise(item.answer))


def same_count(item: Item, parsed: int) -> float:
    return float(parsed == scorers.parse_count(item.answer))


def parse_order(text: str, item: Item) -> Any:
    """One of the choices where there are any, else a sequence of numbers."""
    if item.choices:
        whole = [c for c in item.choices if scorers.normalise(c) == scorers.normalise(text)]
        return whole[0] if whole else scorers.only_choice(text, item.choices)
    return scorers.parse_sequence(text)


def score_order(item: Item, parsed: Any) -> float:
    return same(item, parsed) if item.choices else float(parsed == scorers.parse_sequence(item.answer))


def chance_of_order(item: Item, rows: list[Item]) -> float:
    return 1 / len(item.choices) if item.choices else chance_order(len(scorers.parse_sequence(item.answer) or []))


def score_box(item: Item, parsed: list[float]) -> float:
    truth = scorers.parse_box(item.answer)
    return float(truth is not None and scorers.iou(parsed, truth) >= IOU_THRESHOLD)


def box_chance(item: Item, rows: list[Item]) -> float:
    truth = scorers.parse_box(item.answer)
    return chance_box(truth, IOU_THRESHOLD) if truth else 0.0
