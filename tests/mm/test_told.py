"""Told pictures: what patches spell is what a decoder reads, and nothing else of the model takes part."""

import numpy as np
import pytest
import torch

from mm.batch import Batch
from mm.processor import Processor
from mm.told import Told, spell, spelt
from tests.stages.engine_toy import IMAGE, KEYE

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
