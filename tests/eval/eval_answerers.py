"""A small world of real pictures, and a model that really looks at them: it names the brightest channel."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.answer import Media
from eval.floors import chance_choices
from eval.scorers import only_choice
from eval.task import Item, Task, media_parts
from eval.world import same
from mm.common.errors import BadSample
from mm.common.seeds import derive

COLOURS = ("red", "green", "blue")


@dataclass
class Example:
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    grid_thw: torch.Tensor
    pixel_values: torch.Tensor


class ColourReader:
    """Answers with the colour of the pixels it is given; `calls` counts prompts, `stop_after` batches."""

    def __init__(self, stop_after: int | None = None):
        self.calls, self.reads, self.stop_after = 0, 0, stop_after

    def frames(self, messages: list[dict], root: Path) -> list[np.ndarray]:
        out = []
        for part in messages[0]["content"][:-1]:
            try:
                self.reads += 1
                out.append(np.asarray(Image.open(root / part["image"]))[None])
            except OSError as e:
                raise BadSample("not an image", key=part["image"]) from e
        return out

    def example(self, messages: list[dict], root: Path) -> Example:
        frames = self.frames(messages, root)
        text = messages[0]["content"][-1]["text"]
        ids = torch.tensor(list(text.encode()))
        pixels = torch.from_numpy(np.concatenate([f.reshape(-1, 3) for f in frames]))
        return Example(ids, ids[None].expand(3, -1), torch.tensor([[1, len(pixels), 1]]), pixels)

    def answer(self, examples: list[Any], max_new_tokens: int) -> list[str]:
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += len(examples)
        return [f"It is {COLOURS[int(e.pixel_values.float().mean(0).argmax())]}." for e in examples]


class Guesser:
    """Sees real clips and pictures through the real processor, and knows the right answer `share` of the time;
    of grey pictures it knows nothing and says what it said last."""

    def __init__(self, tasks: list[Task], processor: Any, share: float = 0.7):
        self.media, self.share, self.last = Media(processor), share, "nothing"
        self.truth = {repr(i.messages): self._says(t, i) for t in reversed(tasks) for i in t.items}

    @staticmethod
    def _says(task: Task, item: Item) -> str:
        return item.meta["caption"] if task.name.startswith("caption") else item.answer

    def frames(self, messages: list[dict], root: Path) -> list[np.ndarray]:
        return [self.media.load(root, part)[0] for part in media_parts(messages)]

    def example(self, messages: list[dict], root: Path) -> Example:
        frames = self.frames(messages, root)
        pixels = torch.from_numpy(np.concatenate([f.reshape(-1, 3) for f in frames]))
        text = torch.tensor(list(repr(messages).encode()))
        return Example(text, text[None].expand(3, -1), torch.tensor([[1, len(pixels), 1]]), pixels)

    def answer(self, examples: list[Any], max_new_tokens: int) -> list[str]:
        return [self._answer(bytes(e.input_ids.tolist()).decode(), e.pixel_values) for e in examples]

    def _answer(self, text: str, pixels: torch.Tensor) -> str:
        sees = len(pixels.unique()) > 1 and derive(0, text) % 1000 < 1000 * self.share
        answer = self.truth[text] if sees else self.last
        self.last = self.truth[text] if derive(1, text) % 3 == 0 else self.last
        return answer


def picture(path: Path, colour: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 90, (8, 8, 3), dtype=np.uint8)
    pixels[..., colour] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def colour_task(root: Path, *, n: int = 30, name: str = "colour", train: int = 60) -> Task:
    """`n` test pictures in two splits and `train` more, with the truth as answer."""
    items = []
    for i in range(n + train):
        split = "train" if i >= n else ("seen" if i % 2 else "unseen")
        picture(root / f"p{i}.png", i % 3, i)
        content = [{"type": "image", "image": f"p{i}.png"}, {"type": "text", "text": "Which colour?" + " " * (i % 5)}]
        items.append(Item(f"{i:03d}", name, "colour", split, [{"role": "user", "content": content}],
                          COLOURS[i % 3], COLOURS))  # fmt: skip
    return Task(
        name, [i for i in items if i.split != "train"], [i for i in items if i.split == "train"], root,
        lambda text, item: only_choice(text, COLOURS), same, chance_choices,
    )  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
