"""Keye whose pictures are told: what each place of a picture shows comes as words, and a decoder learns to read it.

A told picture travels as pixels do, so nothing else has to know of it: in each patch the pixels of the first row
spell token numbers, one each, its lowest byte in red, then green, then blue.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mm.batch import RegionBatch
from mm.keye import Keye, merge_order
from vision.text_tower import region_patches, word_losses

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


SURE = 6.0  # the logit of a word where a visual token is that word and nothing else
NEAR = 0.02  # what the distance weighs in the loss of `Aligned`


class Aligned(Keye):
    """A Keye whose projector learns to give for a picture what the same picture, told, gives."""

    def loss(self, batch: RegionBatch) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        """(fp32 sum over the visual tokens, their number), of two terms. How well each word of a region can be told
        from its rivals, by the product of the visual token with the word's embedding: as in
        `ContrastiveModel.region_losses`, so that what no picture shows together is not learnt to exclude each other.
        And, by `NEAR`, the squared distance from what is told of the same place, in words (the mean
        square of an embedding)."""
        table = self.model.embed_tokens.weight.detach().float()
        features = self.visual_features(batch.pixel_values, batch.grid_thw).float()
        merge, word = self.config.merge_size, table.square().sum(1).mean()
        apart = (features - named_features(table, batch, merge)).square().sum() / word
        rows, of = region_patches(batch.regions, batch.grid_thw)
        place = merge_order(batch.grid_thw, merge).argsort() // merge**2  # visual token of each patch
        logits = features @ table[batch.words].T * (SURE / word)
        starts = batch.cu_seqlens.long()
        ends = torch.arange(len(starts), device=starts.device)  # the end marks that are left out before each name
        kept = _words(batch)
        ids, rivals = batch.input_ids[kept], batch.rivals[kept]
        told = word_losses(logits[place[rows]], of, ids, starts - ends, batch.words, rivals)
        return told.sum() / merge**2 + NEAR * apart, len(features)


def named_features(table: torch.Tensor, batch: RegionBatch, merge: int) -> torch.Tensor:
    """What `Told` gives for these pictures, told by the names of their regions: [n, D] from embeddings [V, D]."""
    lengths, kept = batch.cu_seqlens.diff().long(), _words(batch)
    of_token = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths)
    names = table.new_zeros(len(lengths), table.shape[1]).index_add(0, of_token[kept], table[batch.input_ids[kept]])
    rows, of = region_patches(batch.regions, batch.grid_thw)
    patches = table.new_zeros(len(batch.pixel_values), table.shape[1]).index_add(0, rows, names[of])
    return patches[merge_order(batch.grid_thw, merge)].unflatten(0, (-1, merge**2)).mean(1)


def _words(batch: RegionBatch) -> torch.Tensor:
    """bool [L]: the tokens of names without their end marks, which no picture tells."""
    return torch.ones_like(batch.input_ids, dtype=torch.bool).index_fill(0, batch.cu_seqlens[1:].long() - 1, False)
