"""Keye whose pictures are told: what each place of a picture shows comes as words, and a decoder learns to read it.

A told picture travels as pixels do, so nothing else has to know of it: in each patch the pixels of the first row
spell token numbers, one each, its lowest byte in red, then green, then blue.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

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


SURE = 6.0  # the logit of a word where a visual token is that word and nothing else; of the end of a name, half of it


class Aligned(Keye):
    """A Keye whose projector learns to give for a picture what the same picture, told, gives."""

    def region_losses(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, regions: torch.Tensor, input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor, words: torch.Tensor, rivals: torch.Tensor,
    ) -> dict[str, tuple[torch.Tensor, int]]:  # fmt: skip
        """{"words", "distance"}: (fp32 sum over the visual tokens, their number). The arguments are those of
        `mm.batch.RegionBatch`.

        words: how well each word of a name can be told from its rivals, by the product of the visual token with the
        word's embedding, as `ContrastiveModel.region_losses` asks it of patches: what no picture shows together is
        not learnt to exclude each other. No picture tells the end of a name: it stands where no other word is as loud
        as half a word. distance: the square of that from what is told of the same place, in words (the mean square
        of an embedding).
        """
        table, merge = self.model.embed_tokens.weight.detach().float(), self.config.merge_size
        features = self.visual_features(pixel_values, grid_thw).float()
        word, ends = table.square().sum(1).mean(), input_ids[cu_seqlens[1:].long() - 1]
        rows, of = region_patches(regions, grid_thw)
        place = merge_order(grid_thw, merge).argsort() // merge**2  # the visual token of each patch
        logits = ((features @ table[words].T).float() * (SURE / word)).masked_fill(torch.isin(words, ends), SURE / 2)
        asked = rivals.sum(1) > 1
        told = word_losses(
            logits[place[rows]], of, input_ids[asked], starts_of(asked, cu_seqlens), words, rivals[asked]
        )
        apart = features - named_features(table, grid_thw, rows, of, input_ids, cu_seqlens, merge)
        n = len(features)
        return {"words": (told.sum() / merge**2, n), "distance": (apart.square().sum() / word, n)}


def named_features(
    table: torch.Tensor, grid_thw: torch.Tensor, rows: torch.Tensor, of: torch.Tensor, input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor, merge: int,
) -> torch.Tensor:  # fmt: skip
    """What `Told` gives for these pictures, told by the names of their regions (without their end marks, and however
    many lie in one patch): [n, D] from embeddings [V, D]. rows, of: as `region_patches` gives them."""
    kept = torch.ones_like(input_ids, dtype=torch.bool).index_fill(0, cu_seqlens[1:].long() - 1, False)
    lengths = starts_of(kept, cu_seqlens).diff()
    of_token = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths)
    names = table.new_zeros(len(lengths), table.shape[1]).index_add(0, of_token, table[input_ids[kept]])
    patches = table.new_zeros(int(grid_thw.prod(1).sum()), table.shape[1]).index_add(0, rows, names[of])
    return patches[merge_order(grid_thw, merge)].unflatten(0, (-1, merge**2)).mean(1)


def starts_of(kept: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """int64 [R + 1]: where each text starts once only the tokens `kept`, bool [L], are left."""
    return F.pad(kept.cumsum(0), (1, 0))[cu_seqlens.long()]
