"""The projector learns to give for a picture what the same picture, told in words, gives (`mm.told`)."""

from collections.abc import Sequence
from typing import Any

import torch

from mm.batch import RegionBatch
from stages.engine import flops
from stages.objectives.objective import grids
from stages.objectives.words import Words, checked, whole_pictures
from stages.stage import Budget


class ToldFeatures(Words):
    """Means over the visual tokens of the whole step of `mm.told.Aligned.region_losses`; the loss is words +
    `distance` * distance. A decoder that has learnt to read told pictures (`keye.told_tasks`) then reads real
    ones, as far as the tower knows the words (`benchmarks/projector.py` sets this against distance alone, and
    captions)."""

    def __init__(self, words: float = 1.0, distance: float = 0.02):
        self.loss_weights = checked("told_features", words=words, distance=distance)

    def counts(self, batches: Sequence[RegionBatch]) -> dict[str, float]:
        return dict.fromkeys(self.loss_weights, float(sum(len(b.pixel_values) // 4 for b in batches)))

    def flops(self, model: Any, batches: Sequence[RegionBatch]) -> float:
        return sum(flops.of_aligned(model, b).training for b in batches)

    def blank(self, model: Any) -> RegionBatch:
        return whole_pictures(model.config.vision, torch.tensor([[1, 2, 2]]), 1)

    def shaped(self, model: Any, budget: Budget, pieces: int = 1) -> RegionBatch:
        grid = grids(max(budget.visual_tokens, pieces), pieces)
        return whole_pictures(model.config.vision, grid, model.config.decoder.vocab_size)
