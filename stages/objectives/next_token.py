"""Next-token prediction: cross entropy of the trained tokens, each weighing the same wherever it lies."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mm.batch import Batch
from stages.engine import flops
from stages.objectives.objective import Objective, Terms, device_of, grids, most
from stages.stage import Budget


class NextToken(Objective):
    """Sum of token losses / trained tokens in the whole step. The model offers `loss(batch) -> (sum, n)`."""

    def counts(self, batches: Sequence[Batch]) -> dict[str, float]:
        return {"next_token": float(sum(int(b.target_mask().sum()) for b in batches))}

    def accumulate(
        self, model: Any, batches: Sequence[Batch], denominators: dict[str, float], phase: str = "main"
    ) -> Terms:
        device = device_of(model)
        total, count = torch.zeros((), device=device), 0.0
        weight = 1.0 / max(denominators["next_token"], 1e-9)
        for i in range(most(batches, device)):
            batch = batches[i] if i < len(batches) else self.blank(model).to(device)
            loss, n = model.loss(batch)
            (loss * weight).backward()
            total, count = total + loss.detach(), count + float(n)
        return {"next_token": (total, count)}

    def measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        patches = sum(b.pixel_values.shape[0] for b in batches)
        return {**super().measure(batches), "patches": patches}

    def flops(self, model: Any, batches: Sequence[Batch]) -> float:
        return sum(flops.of_batch(model, b).training for b in batches)

    def blank(self, model: Any) -> Batch:
        """Two tokens, nothing to predict, no picture: weighs nothing, runs every collective."""
        return _batch(model, [2], torch.zeros(0, 3, dtype=torch.int64), trained=False)

    def shaped(self, model: Any, budget: Budget, pieces: int = 1) -> Batch:
        """Equal segments, in each a picture with its share of `visual_tokens`; all other tokens trained."""
        length = max(budget.tokens // pieces, 2)
        lengths = [length] * (pieces - 1) + [max(budget.tokens - length * (pieces - 1), 2)]
        return _batch(model, lengths, grids(min(budget.visual_tokens, (length - 2) * pieces), pieces), trained=True)


class ToldNextToken(NextToken):
    """The same for conversations whose pictures are told in words (`mm.told`)."""

    kind = "told"

    def flops(self, model: Any, batches: Sequence[Batch]) -> float:
        """Words are looked up in a table: of pictures only the decoder's share is work."""
        return super().flops(model, [replace(b, grid_thw=b.grid_thw[:0]) for b in batches])


def _batch(model: Any, lengths: list[int], grid: torch.Tensor, *, trained: bool) -> Batch:
    patch, merge = model.config.vision.patch_size, model.config.merge_size
    starts = torch.tensor([0, *lengths]).cumsum(0)
    patches, total = int(grid.prod(1).sum()), int(starts[-1])
    ids, mask = torch.zeros(total, dtype=torch.int64), torch.full((total,), trained)
    for start, one in zip(starts.tolist(), grid.prod(1).tolist(), strict=False):
        ids[start + 1 : start + 1 + one // merge**2] = model.config.image_token_id
        mask[start : start + 1 + one // merge**2] = False
    return Batch(
        input_ids=ids, loss_mask=mask, position_ids=torch.arange(total).expand(3, -1).contiguous(),
        cu_seqlens=starts.to(torch.int32),
        pixel_values=torch.zeros(patches, 3 * patch * patch, dtype=torch.uint8), grid_thw=grid,
    )  # fmt: skip
