"""What a score has to beat: uniform guessing, the commonest answer, no picture, colours alone."""

import dataclasses
import functools
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eval.task import Item, Task
from mm.common.seeds import rng

RANDOM_BOXES = 4096
MAJORITY_CANDIDATES = 64
GREY = 128  # the processor maps 127.5 to zero


# ---- chance: expected score of a uniform guess in the answer space


def chance_choices(item: Item, rows: list[Item]) -> float:
    """One of the item's choices; without any, one of the answers to this type of question; else 0."""
    space = len(item.choices or ()) or len({r.answer for r in rows if r.type == item.type})
    return 1 / space if space else 0.0


def chance_open(item: Item, rows: list[Item]) -> float:
    """Free text: a guess is never right."""
    return 0.0


def chance_order(n: int) -> float:
    """One of the n! orders."""
    return 1 / math.factorial(n) if n else 0.0


def chance_box(truth: Sequence[float], threshold: float = 0.5) -> float:
    """Share of boxes with uniform corners whose overlap with `truth` reaches the threshold (fixed seed)."""
    boxes, t = _random_boxes(), np.asarray(truth, dtype=np.float64)
    sides = np.minimum(boxes[:, 1], t[2:]) - np.maximum(boxes[:, 0], t[:2])  # [boxes, 2]
    overlap = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 1] - boxes[:, 0]).prod(axis=1) + (t[2:] - t[:2]).prod()
    return float(np.mean(overlap >= threshold * (areas - overlap)))


@functools.cache
def _random_boxes() -> np.ndarray:
    corners = rng(0, "chance_box").uniform(0, 1000, (RANDOM_BOXES, 2, 2))
    return np.stack([corners.min(axis=1), corners.max(axis=1)], axis=1)  # [boxes, low or high corner, xy]


# ---- answers as classes


def to_class(task: Task, item: Item) -> str:
    """The right answer as majority and probe know it: itself, or `#place` where choices differ between items."""
    if task.by_place and item.choices and item.answer in item.choices:
        return f"#{item.choices.index(item.answer)}"
    return item.answer


def from_class(task: Task, item: Item, found: str) -> str:
    """What a class says about this item."""
    if task.by_place and item.choices and found.startswith("#"):
        return item.choices[int(found[1:]) % len(item.choices)]
    return found


# ---- majority


def majority_classes(task: Task, rows: list[Item]) -> dict[str, str]:
    """Per type of question, the training answer (as a class) that would score best if given always.

    For 0/1 exact answers this is the most frequent one; for boxes the most central one.
    """
    by_type: dict[str, list[Item]] = {}
    for row in rows:
        by_type.setdefault(row.type, []).append(row)
    return {kind: _best_class(task, of_kind) for kind, of_kind in by_type.items()}


def _best_class(task: Task, rows: list[Item]) -> str:
    counts = Counter(to_class(task, r) for r in rows)
    if task.by_place:
        return counts.most_common(1)[0][0]
    if task.space == "closed":  # answers that mean the same (是, yes) count together
        means = {r.answer: repr(task.check(r, r.answer)[0]) for r in rows}
        groups = Counter(means[r.answer] for r in rows)
        return max(counts, key=lambda a: (groups[means[a]], counts[a]))
    candidates = [a for a, _ in counts.most_common(MAJORITY_CANDIDATES)]
    gains = [sum(task.check(r, a)[1] for r in rows[:200]) for a in candidates]
    return candidates[int(np.argmax(gains))]


# ---- blind


def blind(example: Any) -> Any:
    """The same example with every pixel mean grey: same grids, same tokens, nothing to see."""
    return dataclasses.replace(example, pixel_values=torch.full_like(example.pixel_values, GREY))


def blind_key(example: Any, max_new_tokens: int) -> str:
    """Equal for examples that are the same once blind: one answer serves them all."""
    digest = hashlib.sha256(str(max_new_tokens).encode())
    for x in (example.input_ids, example.position_ids, example.grid_thw):
        digest.update(np.ascontiguousarray(x.cpu().numpy()).tobytes() + b"|")
    return digest.hexdigest()


# ---- probe


def colour_features(media: list[np.ndarray]) -> np.ndarray:
    """4x4x4 RGB histogram of the first medium (mean over time) and of all others: float32 [128].

    Args: media: uint8 [T, H, W, 3] each, as the processor resized them.
    """
    hists = [_histogram(frames) for frames in media]
    rest = np.mean(hists[1:], axis=0) if len(hists) > 1 else np.zeros(64, np.float32)
    return np.concatenate([hists[0] if hists else np.zeros(64, np.float32), rest]).astype(np.float32)


def _histogram(frames: np.ndarray) -> np.ndarray:
    bins = frames.reshape(-1, 3) >> 6  # [pixels, 3], each 0..3
    index = bins[:, 0].astype(np.int64) * 16 + bins[:, 1] * 4 + bins[:, 2]
    return (np.bincount(index, minlength=64) / max(len(index), 1)).astype(np.float32)


class Probe:
    """Logistic regression from colours and the question's type to the answer's class.

    What it gets right needs no eyes for shape, motion, text or place. Answers seen once in training
    cannot be learnt and are left out; an open answer space leaves it nearly nothing to say.

    Args: kinds: the questions' types; features: float32 [n, 128]; classes: the answers.
    """

    def __init__(self, kinds: list[str], features: np.ndarray, classes: list[str], *, max_classes: int = 64):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.kinds = sorted(set(kinds))
        counts = Counter(classes)
        kept = {a for a, n in counts.most_common(max_classes) if n > 1} or {counts.most_common(1)[0][0]}
        use = [i for i, c in enumerate(classes) if c in kept]
        self.constant = next(iter(kept)) if len(kept) == 1 else None
        if self.constant is None:
            self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=300, tol=1e-3))
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                self.model.fit(self._inputs([kinds[i] for i in use], features[use]), [classes[i] for i in use])

    def _inputs(self, kinds: list[str], features: np.ndarray) -> np.ndarray:
        one_hot = np.array([[float(k == t) for t in self.kinds] for k in kinds], dtype=np.float32)
        return np.concatenate([features, one_hot.reshape(len(kinds), len(self.kinds))], axis=1)

    def predict(self, kinds: list[str], features: np.ndarray) -> list[str]:
        if self.constant is not None:
            return [self.constant] * len(kinds)
        return [str(a) for a in self.model.predict(self._inputs(kinds, features))]


def probe_answers(
    task: Task, train: list[Item], train_features: Any, test: list[Item], test_features: Any
) -> list[str]:
    """The probe's answers for `test`; without training rows, cross-validated on the test rows themselves."""
    fit = lambda rows, x: Probe([r.type for r in rows], x, [to_class(task, r) for r in rows])
    say = lambda probe, rows, x: [
        from_class(task, r, c) for r, c in zip(rows, probe.predict([r.type for r in rows], x), strict=True)
    ]
    features = np.asarray(test_features)
    if train:
        return say(fit(train, np.asarray(train_features)), test, features)
    out = [""] * len(test)
    folds = min(5, len(test))
    order = rng(0, "probe_folds").permutation(len(test))
    for fold in range(folds if folds > 1 else 0):
        held, rest = order[fold::folds].tolist(), [i for f in range(folds) if f != fold for i in order[f::folds]]
        answers = say(fit([test[i] for i in rest], features[rest]), [test[i] for i in held], features[held])
        for i, answer in zip(held, answers, strict=True):
            out[i] = answer
    return out
