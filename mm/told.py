"""Keye whose pictures are told: what each place of a picture shows comes as words, and a decoder learns to read it.

A told picture travels as pixels do, so nothing else has to know of it: in each patch the pixels of the first row
spell token numbers, one each, its lowest byte in red, then green, then blue.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mm.keye import Keye, merge_order

Place = tuple[int, int, int, int, int]  # frame, then top, left, bottom, right in patches, the last two exclusive


def spell(
    shape: tuple[int, int, int], places: Iterable[tuple[Place, Sequence[int]]], patch: int
) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] whose patches spell the token numbers of all places that cover them, as many as fit
    (one a pixel of the patch's first row). `shape`: [T, H, W] in px; black tells nothing."""
    frames = np.zeros((*shape, 3), np.uint8)
    used = np.zeros((shape[0], shape[1] // patch, shape[2] // patch), int)
    for (frame, top, left, bottom, right), ids in places:
        rows, columns = (axis.ravel() for axis in np.mgrid[top:bottom, left:right])
        for token in ids:
            room = used[frame, rows, columns] < patch
            rows, columns = rows[room], columns[room]
            at = used[frame, rows, columns]
            frames[frame, rows * patch, columns * patch + at] = np.array([token + 1], "<u4").view(np.uint8)[:3]
            used[frame, rows, columns] += 1
    return frames


def spelt(pixel_values: torch.Tensor, patch: int) -> torch.Tensor:
    """uint8 [N, 3 * patch * patch] -> int64 [N, patch]: the token numbers each patch spells, -1 where none."""
    red, green, blue = pixel_values.long().unflatten(1, (3, patch * patch))[..., :patch].unbind(1)
    return red + 256 * green + 65536 * blue - 1


class Told(Keye):
    """A Keye that reads told pictures: a visual token is the mean, over its patches, of the sum of the embeddings of
    the words they spell. Tower and projector are there, as in the checkpoint it hands on, and unused."""

    def visual_features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3 * patch * patch], int64 [M, 3] -> [n, D]."""
        ids = spelt(pixel_values, self.config.vision.patch_size)
        words = (ids >= 0) & (ids < self.config.decoder.vocab_size)  # the grey of a step without pictures is no word
        said = self.model.embed_tokens(ids.where(words, 0)) * words[..., None]
        merge = self.config.merge_size**2
        return said.sum(1)[merge_order(grid_thw, self.config.merge_size)].unflatten(0, (-1, merge)).mean(1)
