"""What a benchmark is made of: items, tasks, and the way from a response to an answer."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mm.common.config import nearest
from mm.common.errors import UserError

TEST_SPLITS = ("seen", "unseen", "test")
MEDIA_KINDS = ("image", "video")


@dataclass(frozen=True)
class Item:
    """One question with its right answer.

    `messages` are the user turns; a media part holds a path relative to the task's root.
    `type` is the kind of question inside the task: majority and probe know it, as a reader would.
    `split` is "seen", "unseen", "test" (no splits) or "train" (floors are fitted there, never scored).
    """

    id: str
    task: str
    type: str
    split: str
    messages: list[dict]
    answer: str
    choices: tuple[str, ...] | None = None
    meta: dict = field(default_factory=dict)

    @property
    def media(self) -> list[str]:
        """Paths of the pictures and clips in the order the model sees them."""
        return [part[part["type"]] for part in media_parts(self.messages)]


@dataclass(frozen=True)
class Task:
    """Items that are parsed and scored alike.

    Args:
        items: what is scored; train: rows of the training split, for the floors.
        parse: (response, item) -> answer as JSON has it, or None where the response holds none.
        score: (item, parsed) -> 0..1.
        chance: (item, rows that show the answer space) -> expected score of a uniform guess in it.
        space: "closed" where a guess can be right, "open" where majority and probe can only repeat
            whole training answers.
        judge: (item, response) -> a prompt for a judging model, or None where a rule decides alone.
        verdict: (item, judge's reply) -> score, or None where the reply decides nothing.
        bad: (row, reason) of rows that are no item; reported with what was skipped.
    """

    name: str
    items: list[Item]
    train: list[Item]
    root: Path
    parse: Callable[[str, Item], Any]
    score: Callable[[Item, Any], float]
    chance: Callable[[Item, list[Item]], float]
    max_new_tokens: int = 16
    space: str = "closed"
    ceilings: dict[str, float] = field(default_factory=dict)
    judge: Callable[[Item, str, Any], str | None] | None = None
    verdict: Callable[[Item, str], float | None] | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)

    def ceiling(self, split: str) -> float:
        return self.ceilings.get(split, self.ceilings.get("", 1.0))

    @cached_property
    def by_place(self) -> bool:
        """Whether choices change from item to item, so that answers compare only by their place among them."""
        return len({i.choices for i in (*self.items, *self.train) if i.choices}) > 1

    def chance_of(self, item: Item) -> float:
        return self.chance(item, self._shown)

    @cached_property
    def _shown(self) -> list[Item]:
        """Rows that show the answer space; none where there is no training (test answers alone say too little)."""
        return [*self.train, *self.items] if self.train else []

    def check(self, item: Item, response: str) -> tuple[Any, float]:
        """(parsed, score) of one response."""
        parsed = self.parse(extract_answer(response), item)
        return parsed, (0.0 if parsed is None else float(self.score(item, parsed)))


def media_parts(messages: list[dict]) -> list[dict]:
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    return [p for p in parts if p["type"] in MEDIA_KINDS]


def prompt_text(messages: list[dict]) -> str:
    """The prompt as a person reads it; media are `<image>` and `<video>`."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(p["text"] if p["type"] == "text" else f"<{p['type']}>" for p in parts)
        turns.append(text if message["role"] == "user" else f"[{message['role']}] {text}")
    return "\n".join(turns)


_BOXED = re.compile(r"\\boxed\s*\{")


def extract_answer(response: str) -> str:
    """The final answer of a response in any of Keye's five modes.

    Drops all up to the last `</analysis>` and `</think>`, takes the last `<answer>`, then the last
    `\\boxed{}` (Keye-VL's evaluation; nested braces are kept whole, unclosed tags run to the end).
    """
    text = response
    for tag in ("</analysis>", "</think>"):
        text = text.rpartition(tag)[2]
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    matches = list(_BOXED.finditer(text))
    if matches:
        text = _braced(text, matches[-1].end())
    return text.strip()


def _braced(text: str, start: int) -> str:
    """From `start` (just inside a brace) to its closing brace, or to the end."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:]


def read_items(path: Path) -> list[Item]:
    """Items of one WORLD/eval/*.jsonl. Raises UserError naming file, line and what is missing."""
    items, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["choices"] = tuple(row["choices"]) if row.get("choices") else None
            item = Item(**{k: row[k] for k in ("id", "task", "type", "split", "messages", "answer", "choices")},
                        meta=row.get("meta") or {})  # fmt: skip
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise UserError(f"{path} line {number} is not an item ({e!r}); make the world again") from e
        if item.id in seen:
            raise UserError(f"{path} line {number}: id {item.id!r} was there before; make the world again")
        seen.add(item.id)
        items.append(item)
    return items


def choose(tasks: list[Task], names: Sequence[str] | None, limit: int | None) -> list[Task]:
    """The named tasks, each with at most `limit` items per split."""
    known = [t.name for t in tasks]
    for name in names or ():
        if name not in known:
            raise UserError(f"task {name!r} is not known{nearest(name, known)}")
    kept = [t for t in tasks if names is None or t.name in names]
    return [_limited(t, limit) for t in kept] if limit else kept


def _limited(task: Task, limit: int) -> Task:
    items: list[Item] = []
    for split in sorted({i.split for i in task.items}):
        rows = [i for i in task.items if i.split == split]
        n = min(limit, len(rows))
        items += [rows[k * len(rows) // n] for k in range(n)]
    return replace(task, items=items)
