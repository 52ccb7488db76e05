"""The projector learns to give for a picture what the same picture, told in words, gives (`mm.told`)."""

from collections.abc import Sequence
from typing import Any

import torch

from mm.batch import RegionBatch
from stages.engine import flops
from stages.objectives.next_token import NextToken
from stages.objectives.objective import grids
from stages.objectives.words import whole_pictures
from stages.stage import Budget


class ToldFeatures(NextToken):
    """Mean over the visual tokens of the whole step of what `mm.told.Aligned.loss` sums: how well each tells the
    words of its place from their rivals, and how near it is to what is told there. A decoder that has learnt to read
    told pictures (`keye.told`) then reads real ones, as far as the tower knows the words."""

    kind = "regions"
    term = "told_features"

    def counts(self, batches: Sequence[RegionBatch]) -> dict[str, float]:
        return {self.term: float(sum(len(b.pixel_values) // 4 for b in batches))}

    def measure(self, batches: Sequence[RegionBatch]) -> dict[str, float]:
        return {**super().measure(batches), "tokens": sum(len(b.pixel_values) // 4 for b in batches)}

    def flops(self, model: Any, batches: Sequence[RegionBatch]) -> float:
        return sum(flops.of_aligned(model, b).training for b in batches)

    def blank(self, model: Any) -> RegionBatch:
        """One picture that counts for nothing."""
        return whole_pictures(model.config.vision, torch.tensor([[1, 2, 2]]), 1)

    def shaped(self, model: Any, budget: Budget, pieces: int = 1) -> RegionBatch:
        return whole_pictures(model.config.vision, grids(max(budget.visual_tokens, pieces), pieces), 1)
