"""Sizes, sampling and patches."""

import dataclasses
import json

import numpy as np
import pytest

from mm.common.errors import BadSample, UserError
from mm.processor import Processor
from vision.media import VideoInfo, image_size, video_info


def info(width=640, height=360, frames=300, fps=30.0) -> VideoInfo:
    return VideoInfo(
        width=width, height=height, frames=frames, fps=fps, seconds=frames / fps, rotation=0, audio=False
    )


def test_published_figures():
    p = Processor()
    assert p.tokens(p.image_grid(4004, 3192)) == 16302  # figures of the report: 4004 x 3192 px
    frame = p.video_plan(info(252, 168, 18 * 30))
    assert frame.grid[0] == 36  # 18 s at 2 frames a second


def test_saved_and_loaded_strictly(tmp_path):
    p = Processor(video_fps=1.5, image_max_tokens=99)
    p.save(tmp_path)
    assert Processor.load(tmp_path) == p and Processor.load(tmp_path).hash == p.hash
    data = json.loads((tmp_path / "processor.json").read_text())
    (tmp_path / "processor.json").write_text(json.dumps(data | {"video_fsp": 1}))
    with pytest.raises(UserError, match=r"'video_fsp' is not known; did you mean 'video_fps'"):
        Processor.load(tmp_path)
    (tmp_path / "processor.json").write_text("[]")
    with pytest.raises(UserError, match="object"):
        Processor.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Processor.load(tmp_path / "nowhere")


def test_hash_covers_every_field():
    base = Processor()
    hashes = {base.hash}
    for field in dataclasses.fields(Processor):
        value = getattr(base, field.name)
        changed = dataclasses.replace(base, **{field.name: value * 2 if "max" in field.name else value + 1})
        hashes.add(changed.hash)
    assert len(hashes) == len(dataclasses.fields(Processor)) + 1
    assert Processor(video_fps=2).hash == Processor(video_fps=2.0).hash
    assert len(base.hash) == 12


@pytest.mark.parametrize(
    "bad", [{"patch_size": 0}, {"video_fps": -1.0}, {"merge_size": 2.0}, {"image_min_tokens": 99999},
            {"frame_min_tokens": 9999}, {"video_max_tokens": 5}, {"video_fps": "2"}, {"patch_size": True}]
)  # fmt: skip
def test_nonsense_is_refused(bad):
    with pytest.raises(UserError, match=f"processor.{next(iter(bad))}"):
        Processor(**bad)


def test_the_video_budget_holds_and_is_used():
    random = np.random.default_rng(0)
    for _ in range(1500):
        low = int(random.integers(1, 130))
        p = Processor(frame_min_tokens=low, frame_max_tokens=low + int(random.integers(0, 700)),
                      video_max_tokens=low + int(random.integers(4 * low + 8, 25000)))  # fmt: skip
        w, h = (int(x) for x in random.integers(16, 2000, 2))
        if max(w, h) > 100 * min(w, h):
            continue
        clip = info(w, h, int(random.integers(1, 4000)), float(random.uniform(5, 60)))
        plan = p.video_plan(clip)
        t = plan.grid[0]
        assert p.tokens(plan.grid) <= p.video_max_tokens or t <= 2
        assert t % 2 == 0 or t == clip.frames == 1
        assert (plan.height, plan.width) == (plan.grid[1] * 14, plan.grid[2] * 14)
        assert plan.times.tolist() == (plan.indices / clip.fps).tolist()
        assert plan.seconds_per_frame == pytest.approx(clip.seconds / t)
        assert plan.indices[-1] < clip.frames


def test_a_frame_gets_its_share_not_twice_of_it():
    p = Processor()
    plan = p.video_plan(info(1920, 1080, 60 * 30))  # one minute: 120 frames
    assert plan.grid[0] == 120
    assert p.tokens(plan.grid) // 120 <= 24576 // 120
    long = p.video_plan(info(1920, 1080, 3600 * 30))  # an hour: fewer frames rather than more tokens
    assert p.tokens(long.grid) <= 24576
    assert p.tokens(long.grid) // long.grid[0] >= 100


def test_short_clips():
    p = Processor()
    for frames, expected in [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (7, 4), (300, 20)]:
        assert p.video_plan(info(frames=frames)).grid[0] == expected
    with pytest.raises(BadSample, match="0 frames"):
        p.video_plan(info(frames=0))


def test_reordered_plans():
    plan = Processor().video_plan(info())
    order = list(range(plan.grid[0]))[::-1]
    turned = plan.reordered(order)
    assert turned.indices.tolist() == plan.indices.tolist()[::-1]
    assert turned.times.tolist() == plan.times.tolist()[::-1]
    assert plan.reordered([3, 1]).grid == (2, *plan.grid[1:])
    for bad in ([], [0, 0], [-1, 0], [plan.grid[0]], [0.0], [True], "01", (0, 1), None):
        with pytest.raises(BadSample, match="'frames' is not an order of the 20 sampled frames"):
            plan.reordered(bad)


def test_patches_are_raster_and_channel_first():
    p = Processor()
    frames = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), np.uint8)
    patches = p.patchify(frames)
    assert patches.shape == (2 * 4 * 6, 588) and patches.dtype == np.uint8
    n = 0
    for frame in frames:
        for row in range(4):
            for column in range(6):
                cut = frame[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
                assert np.array_equal(patches[n], cut.transpose(2, 0, 1).ravel())
                n += 1
    for bad in (frames[:, :30], frames.astype(np.float32), frames[..., :2]):
        with pytest.raises(UserError, match="multiples of 28"):
            p.patchify(bad)


def test_real_media_decode_to_what_was_planned(shared_data):
    p = Processor(image_max_tokens=64, frame_min_tokens=4, frame_max_tokens=16, video_max_frames=8)
    for path in (shared_data / "images/photos").glob("*.jpg"):
        assert p.frames_grid(p.load_image(path)) == p.image_grid(*image_size(path))
    clips = [shared_data / "videos/codec" / name for name in ("video_90.mov", "av1_video.mkv", "unordered.mov")]
    for path in [*clips, shared_data / "videos/llm_demo/2.avi", shared_data / "videos/lite/free__sync_test.mp4"]:
        frames, plan = p.load_video(path)
        assert p.frames_grid(frames) == plan.grid == p.video_plan(video_info(path)).grid
