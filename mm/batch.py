"""What the model eats: one packed row of tokens, and the patches of its pictures."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

B = TypeVar("B", "Batch", "PairBatch", "RegionBatch")


def _moved(batch: B, device: torch.device | str) -> B:
    new: dict[str, Any] = {
        f.name: getattr(batch, f.name).to(device, non_blocking=True)
        for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)
    }  # fmt: skip
    return replace(batch, **new)


@dataclass
class Batch:
    """One pack for next-token training or prefill.

    Shapes (L tokens, S segments, N patches, M image or video rows):
        input_ids int64 [L]; loss_mask bool [L], True where the token itself is to be predicted;
        position_ids int64 [3, L] (t, h, w); cu_seqlens int32 [S + 1];
        pixel_values uint8 [N, 3 * patch * patch] (channel, row, column); grid_thw int64 [M, 3] in patches.
        draws: one name per segment ("source/shard/key#epoch"), for the log and for error messages.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    draws: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "Batch":
        return _moved(self, device)

    def target_mask(self) -> torch.Tensor:
        """bool [L]: True at i where token i + 1 lies in the same segment and is to be predicted."""
        mask = torch.zeros_like(self.loss_mask)
        mask[:-1] = self.loss_mask[1:]
        mask[self.cu_seqlens[1:].long() - 1] = False
        return mask


@dataclass
class PairBatch:
    """Image-text pairs for contrastive training.

    Shapes (M pairs, L text tokens, N patches): input_ids int64 [L]; cu_seqlens int32 [M + 1];
    pixel_values uint8 [N, 3 * patch * patch]; grid_thw int64 [M, 3]; row i of the grid goes with text i.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    draws: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "PairBatch":
        return _moved(self, device)


@dataclass
class RegionBatch:
    """Pictures and clips with phrases that name what is in some of their regions.

    Shapes (R regions, L text tokens, N patches, M pictures and clips, U words): input_ids int64 [L];
    cu_seqlens int32 [R + 1]; pixel_values uint8 [N, 3 * patch * patch]; grid_thw int64 [M, 3];
    regions int64 [R, 6]: which row of the grid, which of its frames, then top, left, bottom, right in patches, the
    last two exclusive; words int64 [U], ascending, among them every token of input_ids;
    rivals bool [L, U]: which words each token is to be told from, and itself.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    regions: torch.Tensor
    words: torch.Tensor
    rivals: torch.Tensor
    draws: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "RegionBatch":
        return _moved(self, device)
