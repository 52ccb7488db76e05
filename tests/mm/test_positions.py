"""Positions against transformers' Qwen2.5-VL, and by hand where Keye's seconds go beyond it."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from mm.common.errors import UserError
from mm.positions import position_ids


def theirs(ids, grids, seconds):
    """get_rope_index of transformers on token types (0 text, 1 image, 2 video)."""
    hf = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").Qwen2_5_VLModel
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    me = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    me.get_vision_position_ids = lambda *a, **k: hf.get_vision_position_ids(me, *a, **k)
    images, videos = (torch.tensor([g for g in grids if (g[0] > 1) == clip]).view(-1, 3) for clip in (False, True))
    out, _ = hf.get_rope_index(
        me, torch.zeros(1, len(ids), dtype=torch.int64), torch.tensor([ids]), images, videos,
        [s for g, s in zip(grids, seconds, strict=True) if g[0] > 1],
    )  # fmt: skip
    return out[:, 0]


def layout(parts):
    """[text length | grid, ...] -> token types, spans, grids."""
    ids, spans, grids = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += [0] * part
        else:
            n = part[0] * part[1] * part[2] // 4
            spans.append((len(ids), n))
            grids.append(part)
            ids += [1 if part[0] == 1 else 2] * n
    return ids, spans, grids


@pytest.mark.parametrize("parts", [
    [9], [4, (1, 4, 8), 3], [(1, 6, 2), 5], [2, (1, 2, 2), 1, (1, 10, 4), 1, (1, 4, 4)],
])  # fmt: skip
def test_pictures_and_text_are_qwens(parts):
    ids, spans, grids = layout(parts)
    got = position_ids(len(ids), spans, grids, [0.0] * len(grids))
    assert torch.equal(got, theirs(ids, grids, [0.0] * len(grids)))


@pytest.mark.parametrize("seconds", [0.5, 1.0, 0.37, 2.3, 0.21])
def test_a_clip_is_qwens_with_keyes_seconds(seconds):
    """transformers 5.23 lets the text after a clip start at its largest row or column + 1 even where its time
    goes further; the published rule, and ours, is the largest id of all axes + 1."""
    ids, spans, grids = layout([3, (7, 4, 6), 5])
    got, want = position_ids(len(ids), spans, grids, [seconds]), theirs(ids, grids, [seconds])
    block = slice(3, 3 + 42)
    assert torch.equal(got[:, :45], want[:, :45])
    assert got[0, block].reshape(7, 6)[:, 0].tolist() == [3 + int(i * seconds * 2) for i in range(7)]
    first = int(got[:, block].max()) + 1
    assert got[:, 45:].tolist() == [list(range(first, first + 5))] * 3


def test_by_hand():
    """Two words, a clip of 3 frames of 2x4 patches 0.75 s apart, one word."""
    got = position_ids(2 + 6 + 1, [(2, 6)], [(3, 2, 4)], [0.75])
    assert got.tolist() == [
        [0, 1, 2, 2, 3, 3, 5, 5, 6],
        [0, 1, 2, 2, 2, 2, 2, 2, 6],
        [0, 1, 2, 3, 2, 3, 2, 3, 6],
    ]


def test_a_whole_tick_is_not_lost_to_rounding():
    """49 frames of 1/49 s make a second; in floating point they make a little less."""
    got = position_ids(50, [(0, 50)], [(50, 2, 2)], [1 / 49])
    assert got[0, 49] == 2
    assert got[0, 48] == 1


def test_ids_never_fall_behind_the_text_before():
    """Any mixture: text rises by one, blocks start right after it, nothing is negative."""
    for a, b in itertools.product([(1, 2, 2), (1, 8, 2), (4, 4, 4)], repeat=2):
        ids, spans, grids = layout([3, a, 2, b, 4])
        got = position_ids(len(ids), spans, grids, [0.9, 0.1])
        for (start, n), before in zip(spans, (2, None), strict=True):
            assert got[:, start].tolist() == [int(got[0, start - 1]) + 1] * 3, before
            assert int(got[0, start + n]) == int(got[:, start : start + n].max()) + 1


@pytest.mark.parametrize(("spans", "grids"), [
    ([(2, 5)], [(1, 4, 4)]), ([(8, 4)], [(1, 4, 4)]), ([(2, 4), (4, 4)], [(1, 4, 4)] * 2),
])  # fmt: skip
def test_spans_that_do_not_fit(spans, grids):
    with pytest.raises(UserError, match="does not fit"):
        position_ids(10, spans, grids, [0.0] * len(grids))
