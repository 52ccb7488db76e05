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


def chance_choices(item: Item, train: list[Item]) -> float:
    """One of the item's choices; without any, one of the training answers to this type of question; else 0."""
    space = len(item.choices or ()) or len({r.answer for r in train if r.type == item.type})
    return 1 / space if space else 0.0


def chance_open(item: Item, train: list[Item]) -> float:
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


# ---- majority


def majority_answers(task: Task, rows: list[Item]) -> dict[str, str]:
    """Per type of question, the training answer that would score best if given always.

    For 0/1 exact answers this is the most frequent one; for boxes the most central one.
    """
    by_type: dict[str, list[Item]] = {}
    for row in rows:
        by_type.setdefault(row.type, []).append(row)
    return {kind: _best_answer(task, of_kind) for kind, of_kind in by_type.items()}


def _best_answer(task: Task, rows: list[Item]) -> str:
    counts = Counter(r.answer for r in rows)
    if task.space == "closed":  # answers that mean the same (是, yes) count together
        means = {r.answer: repr(task.check(r, r.answer)[0]) for r in rows}
        groups = Counter(means[r.answer] for r in rows)
        return max(counts, key=lambda a: (groups[means[a]], counts[a]))
    candidates = [a for a, _ in counts.most_common(MAJORITY_CANDIDATES)]
    sample = rows[:200]
    gains = [sum(task.check(r, a)[1] for r in sample) for a in candidates]
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
    """Logistic regression from colours and the question's type to the answer string.

    What it gets right needs no eyes for shape, motion, text or place. Answers seen once in training
    cannot be learnt and are left out; an open answer space leaves it nearly nothing to say.
    """

    def __init__(self, rows: list[Item], features: np.ndarray, *, max_classes: int = 64):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.types = sorted({r.type for r in rows})
        counts = Counter(r.answer for r in rows)
        kept = {a for a, n in counts.most_common(max_classes) if n > 1} or {counts.most_common(1)[0][0]}
        use = [i for i, r in enumerate(rows) if r.answer in kept]
        self.constant = next(iter(kept)) if len(kept) == 1 else None
        if self.constant is None:
            self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=300, tol=1e-3))
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                self.model.fit(self._inputs([rows[i] for i in use], features[use]), [rows[i].answer for i in use])

    def _inputs(self, rows: list[Item], features: np.ndarray) -> np.ndarray:
        kinds = np.array([[float(r.type == t) for t in self.types] for r in rows], dtype=np.float32)
        return np.concatenate([features, kinds.reshape(len(rows), len(self.types))], axis=1)

    def predict(self, rows: list[Item], features: np.ndarray) -> list[str]:
        if self.constant is not None:
            return [self.constant] * len(rows)
        return [str(a) for a in self.model.predict(self._inputs(rows, features))]


def probe_predictions(train: list[Item], train_features: Any, test: list[Item], test_features: Any) -> list[str]:
    """The probe's answers for `test`; without training rows, cross-validated on the test rows themselves."""
    if train:
        return Probe(train, np.asarray(train_features)).predict(test, np.asarray(test_features))
    out, features = [""] * len(test), np.asarray(test_features)
    folds = min(5, len(test))
    if folds < 2:
        return out
    order = rng(0, "probe_folds").permutation(len(test))
    for fold in range(folds):
        held, rest = order[fold::folds].tolist(), [i for f in range(folds) if f != fold for i in order[f::folds]]
        answers = Probe([test[i] for i in rest], features[rest]).predict([test[i] for i in held], features[held])
        for i, answer in zip(held, answers, strict=True):
            out[i] = answer
    return out
