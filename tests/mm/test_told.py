"""Told pictures: what patches spell is what a decoder reads, and nothing else of the model takes part."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mm.batch import Batch, RegionBatch
from mm.processor import Processor
from mm.told import SURE, Aligned, Told, named_features, spell, spelt
from tests.stages.engine_toy import IMAGE, KEYE, regions
from vision.text_tower import region_patches

PROCESSOR = Processor(patch_size=4, image_max_tokens=8)
GRID = torch.tensor([[1, 4, 4], [2, 2, 4]])


def told() -> tuple[Told, torch.Tensor]:
    """A tiny model and the patches of a picture and a clip of two frames, with the places that they tell."""
    model = Told(KEYE)
    model.init_weights(0)
    picture = spell((1, 16, 16), [((0, 0, 0, 2, 2), [7, 9]), ((0, 1, 1, 4, 3), [11])], 4)
    clip = spell((2, 8, 16), [((1, 0, 0, 1, 4), [1, 2, 3, 4, 5])], 4)
    return model, torch.cat([torch.from_numpy(PROCESSOR.patchify(f)) for f in (picture, clip)])


def test_patches_spell_what_covers_them():
    """In their order, as many as a patch has room for; numbers above a byte too."""
    frames = spell((1, 16, 16), [((0, 0, 0, 2, 2), [151_935, 0]), ((0, 1, 1, 2, 3), [3, 4, 5])], 4)
    ids = spelt(torch.from_numpy(PROCESSOR.patchify(frames)), 4).view(4, 4, 4)
    assert ids[0, 0].tolist() == ids[0, 1].tolist() == ids[1, 0].tolist() == [151_935, 0, -1, -1]
    assert ids[1, 1].tolist() == [151_935, 0, 3, 4]  # the fifth has no room
    assert ids[1, 2].tolist() == [3, 4, 5, -1]
    assert (ids[2:] == -1).all() and (ids[:2, 3] == -1).all()


def test_a_visual_token_is_the_mean_of_its_patches_words():
    model, patches = told()
    e = model.model.embed_tokens.weight
    got = model.visual_features(patches, GRID)
    assert got.shape == (8, KEYE.decoder.hidden_size)
    torch.testing.assert_close(got[0], ((e[7] + e[9]) * 4 + e[11]) / 4)
    torch.testing.assert_close(got[1], e[11] / 4)
    torch.testing.assert_close(got[2], e[11] * 2 / 4)
    torch.testing.assert_close(got[6:], ((e[1] + e[2] + e[3] + e[4]) * 2 / 4).expand(2, -1))
    assert not got[4:6].any()


def test_the_tower_takes_no_part():
    """Neither its weights nor the projector's change anything, or have a gradient; the words' embeddings have one."""
    model, patches = told()
    ids = torch.tensor([2, *[IMAGE] * 4, 5, 6, *[IMAGE] * 4, 8])
    batch = Batch(
        input_ids=ids, loss_mask=ids != IMAGE, position_ids=torch.arange(len(ids)).expand(3, -1),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32), pixel_values=patches, grid_thw=GRID,
    )  # fmt: skip
    loss, _ = model.loss(batch)
    loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith(("visual.", "mlp_AR.")))
    rows = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert {7, 9, 11, 1, 2, 3, 4} <= set(rows)
    for name, p in model.named_parameters():
        if name.startswith(("visual.", "mlp_AR.")):
            p.data.normal_()
    assert model.loss(batch)[0] == loss


@pytest.mark.parametrize("words", [[], [((0, 0, 0, 4, 4), [9])]])
def test_black_and_the_grey_of_a_step_without_pictures_tell_nothing(words):
    model, _ = told()
    black = torch.from_numpy(PROCESSOR.patchify(spell((1, 16, 16), words, 4)))
    assert model.visual_features(black, GRID[:1]).any() == bool(words)
    assert not model.visual_features(torch.full((4, 48), 127, dtype=torch.uint8), torch.tensor([[1, 2, 2]])).any()
    assert not np.any(spell((1, 16, 16), [], 4))


def losses(model, batch):
    given = ("pixel_values", "grid_thw", "regions", "input_ids", "cu_seqlens", "words", "rivals")
    return model.region_losses(*(getattr(batch, name) for name in given))


def told_of(table, batch):
    at = region_patches(batch.regions, batch.grid_thw)
    return named_features(table, batch.grid_thw, *at, batch.input_ids, batch.cu_seqlens, 2)


def test_names_of_regions_give_what_the_told_picture_gives():
    """The projector's aim is what `Told` makes of the same places, spelt: of a picture and of a clip."""
    model, patches = told()
    named = [(0, 0, 0, 0, 2, 2), (0, 0, 1, 1, 4, 3), (1, 1, 0, 0, 1, 4)]
    names, end = ([7, 9], [11], [1, 2, 3, 4]), 58  # of a fifth word there is no room in a patch of four
    batch = RegionBatch(
        input_ids=torch.tensor([i for n in names for i in (*n, end)]), cu_seqlens=torch.tensor([0, 3, 5, 10]),
        pixel_values=patches, grid_thw=GRID, regions=torch.tensor(named), words=torch.arange(60),
        rivals=torch.ones(10, 60, dtype=torch.bool),
    )  # fmt: skip
    torch.testing.assert_close(told_of(model.model.embed_tokens.weight, batch), model.visual_features(patches, GRID))


def aligned():
    model = Aligned(KEYE)
    model.init_weights(0)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mlp_AR."))
    return model, model.model.embed_tokens.weight


def test_the_losses_of_a_projector_are_telling_words_from_rivals_and_a_distance():
    """Held against a loop over patches, regions and words."""
    (model, table), batch = aligned(), regions(0, 5)
    features, word = model.visual_features(batch.pixel_values, batch.grid_thw), table.square().sum(1).mean()
    ends = batch.input_ids[batch.cu_seqlens[1:].long() - 1]
    starts, grids, want = batch.cu_seqlens.tolist(), batch.grid_thw.tolist(), torch.zeros(())
    for k, (row, _, top, left, bottom, right) in enumerate(batch.regions.tolist()):
        first, last = starts[k : k + 2]
        before = sum(h * w // 4 for _, h, w in grids[:row])
        for y in range(top, bottom):
            for x in range(left, right):
                feature = features[before + y // 2 * (grids[row][2] // 2) + x // 2]
                logits = feature @ table[batch.words].T * SURE / word
                logits = logits.index_fill(0, ends, SURE / 2)
                told = [F.cross_entropy(logits.masked_fill(~batch.rivals[i], -torch.inf), batch.input_ids[i])
                        for i in range(first, last) if batch.rivals[i].sum() > 1]  # fmt: skip
                want = want + sum(told) / max(len(told), 1) / 4
    got = losses(model, batch)
    assert {n for _, n in got.values()} == {len(batch.pixel_values) // 4}
    torch.testing.assert_close(got["words"][0], want)
    torch.testing.assert_close(got["distance"][0], (features - told_of(table, batch)).square().sum() / word)


def test_a_projector_comes_to_give_what_is_told():
    """Of one picture of two things it gives, with nothing else trained, their words where they lie."""
    model, table = aligned()
    made, stream = regions(0, 1), torch.Generator().manual_seed(0)
    batch = replace(
        made, grid_thw=torch.tensor([[1, 4, 4]]),
        pixel_values=torch.randint(0, 256, (16, 48), dtype=torch.uint8, generator=stream),
        regions=torch.tensor([[0, 0, 0, 0, 4, 2], [0, 0, 0, 2, 4, 4]]), input_ids=torch.tensor([3, 7, 59, 4, 9, 59]),
        cu_seqlens=torch.tensor([0, 3, 6]), rivals=torch.zeros(6, 60, dtype=torch.bool),
    )  # fmt: skip
    for token, among in enumerate(([3, 4], [7, 9], [11, 59]) * 2):
        batch.rivals[token, among] = True
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        got = losses(model, batch)
        (got["words"][0] + 0.02 * got["distance"][0]).backward()
        optimizer.step()
    features = model.visual_features(batch.pixel_values, batch.grid_thw)
    loud = features @ table[[3, 7, 4, 9]].T > table.square().sum(1).mean() / 2
    assert loud.tolist() == [[True, True, False, False], [False, False, True, True]] * 2
    assert torch.cosine_similarity(features, told_of(table, batch)).min() > 0.7
