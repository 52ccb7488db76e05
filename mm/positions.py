"""Three-axis position ids (time, row, column) of a sequence of text and vision tokens."""

import math
from collections.abc import Sequence

import torch

from mm.common.errors import UserError


def position_ids(
    length: int, spans: Sequence[tuple[int, int]], grids: Sequence[tuple[int, int, int]],
    seconds_per_frame: Sequence[float], *, merge_size: int = 2, tokens_per_second: float = 2,
) -> torch.Tensor:  # fmt: skip
    """Position ids of one segment, Qwen2.5-VL's rule with Keye's seconds (arXiv 2507.01949, 2.3).

    A text token has the same id on all axes. A vision block starts where the text before it ended; frame i
    lies `floor(i * seconds * tokens_per_second)` later in time (an image is one frame), rows and columns
    count merged patches; the text after it goes on at the largest id of the block + 1.

    Args:
        length: tokens in the segment.
        spans: (start, n tokens) of each vision block, in order.
        grids: (t, h, w) in patches of each block; n must be t * h * w / merge_size ** 2.
        seconds_per_frame: seconds from one sampled frame to the next, per block; ignored where t = 1.
    Returns: int64 [3, length].
    Raises: UserError where spans overlap, leave the segment or disagree with their grid.
    """
    parts: list[torch.Tensor] = []
    done, current = 0, 0  # tokens placed, next position id
    for (start, count), grid, seconds in zip(spans, grids, seconds_per_frame, strict=True):
        block = _block(grid, seconds, merge_size, tokens_per_second)
        if start < done or start + count > length or count != block.shape[1]:
            raise UserError(
                f"vision block of {count} tokens at {start} does not fit: its grid {tuple(grid)} makes "
                f"{block.shape[1]} tokens, {done} of {length} tokens are placed before it"
            )
        parts += [_text(start - done, current), block + current + (start - done)]
        current = int(parts[-1].max()) + 1
        done = start + count
    return torch.cat([*parts, _text(length - done, current)], dim=1)


def _text(count: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + count).expand(3, -1)


def _block(grid: Sequence[int], seconds: float, merge: int, rate: float) -> torch.Tensor:
    """int64 [3, tokens] of one vision block that starts at 0."""
    t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    # The small term keeps a frame that lies on a whole tick from falling below it by rounding.
    times = [math.floor(i * seconds * rate + 1e-6) if i else 0 for i in range(t)]
    axes = torch.meshgrid(torch.tensor(times), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).flatten(1)
