"""Sizes and resampling against numbers that other code computed."""

import json

import numpy as np
import pytest
from PIL import Image

from mm.common.errors import BadSample
from vision.resize import resize_frames, sample_frames, smart_resize


def test_smart_resize_is_keyes_on_all_rows(shared_data):
    rows = json.loads((shared_data / "oracles/generated/keye_smart_resize.json").read_text())["rows"]
    for height, width, factor, low, high, expected in rows:
        try:
            got = list(smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high))
        except BadSample:
            got = "error"
        assert got == expected or (got == "error" and isinstance(expected, str)), (height, width, factor, low, high)
    assert len(rows) == 210


@pytest.mark.parametrize(
    ("height", "width", "why"),
    [(10, 3000, "aspect ratio 300 > 200"), (0, 10, "no area"), (5, 0, "no area"), (5681, 28, "aspect ratio 203")],
)
def test_smart_resize_refuses(height, width, why):
    with pytest.raises(BadSample, match=why):
        smart_resize(height, width, min_pixels=3136, max_pixels=10**6)


def test_a_shrunk_picture_never_passes_the_bound():
    random = np.random.default_rng(0)
    for _ in range(3000):
        h, w = random.integers(28, 6000, 2)
        high = int(random.integers(4, 400)) * 784
        if max(h, w) / min(h, w) > 200 or h * w < high:
            continue
        a, b = smart_resize(int(h), int(w), min_pixels=784, max_pixels=high)
        assert a % 28 == b % 28 == 0
        assert 0 < a * b <= high, (h, w, high)


def test_resize_is_pillows_bicubic_within_rounding(shared_data):
    oracle = np.load(shared_data / "oracles/generated/pil_resize.npz")
    for name in (n for n in oracle if n.startswith("bicubic")):
        expected = oracle[name].astype(int)
        got = resize_frames(oracle["src"][None], *expected.shape[:2])
        assert got.dtype == np.uint8
        assert np.abs(got[0] - expected).max() <= 1, name


def test_resize_clamps_and_keeps_frames_apart():
    random = np.random.default_rng(0)
    frames = random.choice(np.array([0, 255], np.uint8), (3, 40, 60, 3))
    got = resize_frames(frames, 56, 28)
    for before, after in zip(frames, got, strict=True):
        pillow = np.asarray(Image.fromarray(before).resize((28, 56), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(after - pillow).max() <= 1
    assert resize_frames(frames, 40, 60) is frames
    assert np.array_equal(resize_frames(frames[::-1], 56, 28), got[::-1])  # strided input


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(1, [0]), (2, [0, 1]), (3, [0, 2]), (5, [0, 1, 3, 4]), (100, [0, 14, 28, 42, 57, 71, 85, 99])],
)
def test_sampling_by_hand(frames, expected):
    indices, fps = sample_frames(frames, 25.0, target_fps=2, min_frames=4, max_frames=768)
    assert indices.tolist() == expected
    assert fps == pytest.approx(len(expected) / (frames / 25.0))


def test_sampling_rules_hold_everywhere():
    random = np.random.default_rng(0)
    for _ in range(2000):
        frames, fps = int(random.integers(1, 5000)), float(random.uniform(0.2, 120))
        low, high = sorted(int(x) for x in random.integers(1, 64, 2))
        indices, rate = sample_frames(frames, fps, target_fps=2, min_frames=low, max_frames=high)
        assert len(indices) % 2 == 0 or frames == 1
        assert len(indices) <= max(min(high, frames), 2)
        assert (np.diff(indices) > 0).all()
        assert indices[0] == 0 and indices[-1] == (frames - 1 if len(indices) > 1 else 0)
        assert rate == pytest.approx(len(indices) / (frames / fps))


def test_sampling_refuses_nonsense():
    for frames, fps in [(0, 25.0), (10, 0.0), (10, float("nan")), (10, float("inf"))]:
        with pytest.raises(BadSample):
            sample_frames(frames, fps, target_fps=2, min_frames=4, max_frames=8)
