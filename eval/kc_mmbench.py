"""KC-MMBench: Kuaishou's six short-video tasks, from its official TSV files or the world's of the same form.

    FOLDER/subsets/{CPV,Video_Topic,Video_Order,PornComment,High_like,SPU}.tsv    FOLDER/images/...

Columns: index, question, answer, image_path (one path or a list, below images/), category (optional; a word
"seen", "unseen" or "train" in it is the split, else all rows are "test"). Prompt: pictures, then the question.
Where the official run asks a judging model, `Judge` does; without one those answers count by exact match.
"""

import ast
import csv
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from eval import scorers
from eval.floors import chance_order
from eval.judge import yes_or_no
from eval.task import TEST_SPLITS, Item, Task
from mm.common.errors import UserError
from mm.common.files import read_json

SUFFIX = "\n请直接给出结论，回答是或者否，不需要做额外分析，并且不许回答不确定"
ASKED_ALREADY = (SUFFIX.strip(), "Answer yes or no directly")  # the second: the world's English rows
COLUMNS = ("index", "question", "answer", "image_path")


@dataclass(frozen=True)
class Subset:
    """A task of KC-MMBench: its published name, file, kind of answer and cap on new tokens."""

    name: str
    file: str
    kind: str
    max_new_tokens: int


SUBSETS = (
    Subset("CPV", "CPV", "json", 96),
    Subset("Hot_Videos_Aggregation", "Video_Topic", "yes_no_list", 48),
    Subset("Collection_Order", "Video_Order", "order", 48),
    Subset("Pornographic_Comment", "PornComment", "yes_no", 16),
    Subset("High_like", "High_like", "yes_no", 16),
    Subset("SPU", "SPU", "yes_no", 16),
)


def load_tasks(folder: str | Path, *, splits: Sequence[str] = TEST_SPLITS) -> list[Task]:
    """Tasks of the subsets that are there. Raises UserError where none is, or a file is not of the format."""
    root = Path(folder)
    present = [s for s in SUBSETS if (root / "subsets" / f"{s.file}.tsv").exists()]
    if not present:
        names = ", ".join(f"{s.file}.tsv" for s in SUBSETS)
        raise UserError(f"{root}/subsets holds none of {names}; give the folder that has subsets/ and images/")
    ceilings = read_json(root / "ceilings.json") if (root / "ceilings.json").exists() else {}
    return [_task(s, root, splits, ceilings) for s in present]


def _task(subset: Subset, root: Path, splits: Sequence[str], ceilings: dict) -> Task:
    rows, bad = read_tsv(root / "subsets" / f"{subset.file}.tsv", subset, root)
    rule = RULES[subset.kind]
    return Task(
        subset.name, [r for r in rows if r.split in splits], [r for r in rows if r.split == "train"], root,
        rule.parse, rule.score, rule.chance, max_new_tokens=subset.max_new_tokens,
        ceilings=_ceilings(ceilings, subset),
        judge=rule.judge, verdict=rule.verdict, bad=bad,
    )  # fmt: skip


def _ceilings(found: dict, subset: Subset) -> dict[str, float]:
    """{TASK: value, SPLIT: {TASK: value}} -> {"": value, SPLIT: value}; a task is named by its file or its name."""
    levels = {"": found, **{k: v for k, v in found.items() if isinstance(v, dict)}}
    named = {split: [v[n] for n in (subset.file, subset.name) if n in v] for split, v in levels.items()}
    return {split: float(values[0]) for split, values in named.items() if values}


# ---- files


def read_tsv(path: Path, subset: Subset, root: Path) -> tuple[list[Item], list[tuple[str, str]]]:
    """(items, [(row, why it is none)]) of one official TSV.

    Raises UserError for missing columns, no rows, or text that is not UTF-8, naming the file.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, delimiter="\t")
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
            if missing:
                has = ", ".join(reader.fieldnames or ["none"])
                raise UserError(f"{path} lacks the columns {', '.join(missing)}; it has {has}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is not a UTF-8 TSV: {e}") from e
    if not rows:
        raise UserError(f"{path} holds no rows; delete the file to leave this task out")
    items: dict[str, Item] = {}
    bad = []
    for number, row in enumerate(rows, start=2):
        problem = _problem(row, items)
        if problem:
            bad.append((f"{path.name} row {number} (index {row['index']})", problem))
        else:
            items[row["index"]] = _item(row, subset, root)
    return list(items.values()), bad


def _problem(row: dict, items: dict[str, Item]) -> str:
    if any(row.get(c) is None for c in COLUMNS):
        return "row has too few columns"
    empty = [c for c in COLUMNS if not row[c].strip()]
    if empty:
        return f"{empty[0]} is empty"
    if row["index"] in items:
        return "index was there before"
    return "" if image_paths(row["image_path"]) else "image_path is not a path or a list of paths"


def image_paths(text: str) -> list[str] | None:
    """`a.jpg` or `['a.jpg', 'b.jpg']` (a JSON or Python literal); None where it is neither."""
    text = text.strip()
    if not text.startswith("["):
        return [text] if text else None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    good = isinstance(value, list) and value and all(isinstance(p, str) and p for p in value)
    return value if good else None


def _item(row: dict, subset: Subset, root: Path) -> Item:
    paths = [_below(root, p) for p in image_paths(row["image_path"]) or []]
    question = row["question"]
    if subset.kind == "yes_no" and not any(asked in question for asked in ASKED_ALREADY):
        question += SUFFIX
    content: list[dict] = [{"type": "image", "image": p} for p in paths]
    category = row.get("category") or ""
    words = re.split(r"[^a-z]+", category.casefold())
    split = next((w for w in words if w in ("seen", "unseen", "train")), "test")
    kind = "/".join([str(len(paths)), *(w for w in words if w in ("en", "zh"))])
    return Item(
        row["index"], subset.name, f"{subset.name}/{kind}", split,
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}], row["answer"].strip(),
        meta={"category": category},
    )  # fmt: skip


def _below(root: Path, path: str) -> str:
    """Paths are relative to images/; some releases write the folder's name as well."""
    plain = path.replace("\\", "/").removeprefix("./")
    if plain.startswith("images/") and not (root / "images" / plain).exists():
        return plain
    return f"images/{plain}"


# ---- answers: parse, score, chance and the judge's question, by kind


@dataclass(frozen=True)
class Rule:
    parse: Callable[[str, Item], Any]
    score: Callable[[Item, Any], float]
    chance: Callable[[Item, list[Item]], float]
    judge: Callable[[Item, str, Any], str | None]
    verdict: Callable[[Item, str], float | None]


def _equal(parse: Callable[[str], Any], item: Item, parsed: Any) -> float:
    return float(parsed == parse(item.answer))


def _list_answer(text: str) -> list[str] | None:
    return scorers.yes_no_list(text.replace("_", " "))


def _chance_json(item: Item, rows: list[Item]) -> float:
    """Each attribute guessed among the values that rows show for it; 0 where none shows one."""
    values, chance = _values_shown(tuple(r.answer for r in rows)), 1.0
    for k, v in (_json_answer(item.answer) or {}).items():
        chance *= 1 / len(values[k] | {repr(v)}) if k in values else 0.0
    return chance


@lru_cache(maxsize=4)
def _values_shown(answers: tuple[str, ...]) -> dict[str, set[str]]:
    values: dict[str, set[str]] = {}
    for answer in answers:
        for k, v in (_json_answer(answer) or {}).items():
            values.setdefault(k, set()).add(repr(v))
    return values


def _ask_equal(item: Item, response: str, parsed: Any) -> str | None:
    return (
        "Decide whether a response gives the same final answer as the reference. Wording, order of JSON keys and "
        f"formatting do not matter; content does.\n\n[Question]\n{_question(item)}\n\n[Reference]\n{item.answer}\n\n"
        f"[Response]\n{response}\n\nReply with one word: yes or no."
    )


def _ask_yes_no(item: Item, response: str, parsed: Any) -> str | None:
    if parsed is not None:
        return None
    return (
        f"A model was asked a yes/no question.\n\n[Question]\n{_question(item)}\n\n[Response]\n{response}\n\n"
        "Does the response mean yes or no? Reply with one word: yes, no or unclear."
    )


def _ask_list(item: Item, response: str, parsed: Any) -> str | None:
    if parsed is not None:
        return None
    return (
        "Extract the sequence of 是/否 verdicts, in order, from the response below. Reply with nothing but "
        f"a list such as [是, 否].\n\n[Question]\n{_question(item)}\n\n[Response]\n{response}"
    )


def _question(item: Item) -> str:
    return "".join(p["text"] for p in item.messages[-1]["content"] if p["type"] == "text")


def _verdict_by(parse: Callable[[str], Any], item: Item, reply: str) -> float | None:
    found = parse(reply)
    return None if found is None else _equal(parse, item, found)


def _rule(parse: Callable[[str], Any], chance: Callable, judge: Callable, verdict: Callable) -> Rule:
    return Rule(lambda text, item: parse(text), partial(_equal, parse), chance, judge, verdict)


def _json_answer(text: str) -> dict | None:
    found = scorers.parse_json(text)
    return None if found is None else scorers.canonical(found)


RULES = {
    "yes_no": _rule(scorers.yes_no, lambda item, rows: 0.5, _ask_yes_no, partial(_verdict_by, scorers.yes_no)),
    "yes_no_list": _rule(
        _list_answer, lambda item, rows: 0.5 ** len(_list_answer(item.answer) or []), _ask_list,
        partial(_verdict_by, _list_answer),
    ),
    "order": _rule(
        scorers.parse_sequence, lambda item, rows: chance_order(len(scorers.parse_sequence(item.answer) or [])),
        _ask_equal, lambda item, reply: yes_or_no(reply),
    ),
    "json": _rule(_json_answer, _chance_json, _ask_equal, lambda item, reply: yes_or_no(reply)),
}  # fmt: skip
