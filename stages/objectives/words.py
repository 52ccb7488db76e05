"""Every patch of a named region tells the words of its name, and where it is: a tower from nothing, in minutes."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from mm.batch import RegionBatch
from mm.common.errors import UserError
from stages.engine import flops
from stages.objectives.objective import Objective, Terms, device_of, grids, most
from stages.stage import Budget
from vision.text_tower import region_patches
from vision.vit import VisionConfig


class Words(Objective):
    """Means over the whole step of `model.region_losses`: of words and silence over patches, so that a thing counts
    for more than a letter, and of places over regions; the loss is words + `silence` * silence + `places` * places.

    Words are after "Classification Done Right" (Huang et al. 2024, arXiv 2411.03313), where a picture's classes are
    the tokens of its caption; here those of a phrase are asked of each patch that its box touches, each among what
    else could stand in its place (`data_mix.regions.Names`). Silence of the patches that no box touches and places
    are ours: a thing has the same name wherever it lies, so words alone never ask a tower to keep where that is.
    """

    kind = "regions"

    def __init__(self, places: float = 1.0, silence: float = 1.0):
        self.loss_weights = checked("words", words=1.0, silence=silence, places=places)

    def counts(self, batches: Sequence[RegionBatch]) -> dict[str, float]:
        inside = [region_patches(b.regions, b.grid_thw)[0] for b in batches]
        bare = sum(len(b.pixel_values) - len(rows.unique()) for b, rows in zip(batches, inside, strict=True))
        return {
            "words": float(sum(map(len, inside))), "silence": float(bare),
            "places": float(sum(len(b.regions) for b in batches)),
        }  # fmt: skip

    def accumulate(
        self, model: Any, batches: Sequence[RegionBatch], denominators: dict[str, float],
        phase: str = "main",
    ) -> Terms:  # fmt: skip
        device = device_of(model)
        weights = {term: self.loss_weights[term] / max(n, 1e-9) for term, n in denominators.items()}
        terms: Terms = {term: (torch.zeros((), device=device), 0.0) for term in weights}
        for i in range(most(batches, device)):
            real = i < len(batches)
            b = batches[i] if real else self.blank(model).to(device)
            losses = model.region_losses(
                b.pixel_values, b.grid_thw, b.regions, b.input_ids, b.cu_seqlens, b.words, b.rivals
            )
            used = [loss * weights[term] * real for term, (loss, _) in losses.items() if weights[term]]
            torch.stack(used).sum().backward()
            for term, (loss, n) in losses.items():
                terms[term] = (terms[term][0] + loss.detach() * real, terms[term][1] + n * real)
        return terms

    def flops(self, model: Any, batches: Sequence[RegionBatch]) -> float:
        return sum(flops.of_regions(model, b).training for b in batches)

    def measure(self, batches: Sequence[RegionBatch]) -> dict[str, float]:
        patches = sum(b.pixel_values.shape[0] for b in batches)
        return {**super().measure(batches), "tokens": patches // 4, "patches": patches}

    def blank(self, model: Any) -> RegionBatch:
        """One region of which nothing counts: what a rank with nothing left runs."""
        return whole_pictures(model.vision_model.config, torch.tensor([[1, 2, 2]]), 1)

    def shaped(self, model: Any, budget: Budget, pieces: int = 1) -> RegionBatch:
        words = model.text_model.config.vocab_size
        return whole_pictures(model.vision_model.config, grids(max(budget.visual_tokens, pieces), pieces), words)


def checked(objective: str, **weights: float) -> dict[str, float]:
    """The weights of an objective's terms. Raises UserError for one that is none."""
    for term, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"objective {objective}: {term}={weight} must be a weight of 0 or more")
    if not any(weights.values()):
        raise UserError(f"objective {objective}: one of {', '.join(weights)} must weigh more than 0")
    return weights


def whole_pictures(vision: VisionConfig, grid: torch.Tensor, words: int) -> RegionBatch:
    """One region a picture, all of it, its name the first of so many words."""
    patch, rows = vision.patch_size, torch.arange(len(grid))
    zero = torch.zeros_like(rows)
    return RegionBatch(
        input_ids=zero, cu_seqlens=torch.arange(len(grid) + 1, dtype=torch.int32),
        pixel_values=torch.zeros(int(grid.prod(1).sum()), 3 * patch * patch, dtype=torch.uint8), grid_thw=grid,
        regions=torch.stack([rows, zero, zero, zero, grid[:, 1], grid[:, 2]], dim=1),
        words=torch.arange(words), rivals=torch.ones(len(grid), words, dtype=torch.bool),
    )  # fmt: skip
