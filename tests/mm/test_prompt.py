"""From messages and files to the tensors of a batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from mm.common.errors import BadSample, UserError
from mm.processor import Processor
from mm.prompt import Example, file_loader, join, media_grids, media_tokens, prepare, sample_tokens
from mm.tokenizer import Tokenizer
from vision.media import VideoInfo, image_size, video_info

PROCESSOR = Processor(
    image_max_tokens=16, frame_min_tokens=4, frame_max_tokens=12, video_max_tokens=96, video_max_frames=8
)
CLIP = VideoInfo(width=112, height=84, frames=80, fps=20.0, seconds=4.0, rotation=0, audio=True)
PLAN = PROCESSOR.video_plan(CLIP)
IMAGE = {"type": "image", "image": "0.jpg"}
VIDEO = {"type": "video", "video": "mp4"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["system\nYou are a helpful assistant.", "what is it? a ball"] * 10, 400)


def load(part):
    """Frame i of the clip is all i."""
    if part["type"] == "image":
        return np.full((1, 56, 84, 3), 99, np.uint8), None
    frames = np.repeat(np.arange(PLAN.grid[0], dtype=np.uint8), PLAN.height * PLAN.width * 3)
    return frames.reshape(-1, PLAN.height, PLAN.width, 3), PLAN


def ask(*parts, answer="a ball"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": answer}]  # fmt: skip


def test_one_example(tokenizer):
    example = prepare(ask(IMAGE, VIDEO), PROCESSOR, tokenizer, load)
    t, h, w = PLAN.grid
    assert t == 8 and example.grid_thw.tolist() == [[1, 4, 6], [t, h, w]]
    assert example.pixel_values.shape == (24 + t * h * w, 588) and example.pixel_values.dtype == torch.uint8
    assert (example.input_ids == tokenizer.id("<|image_pad|>")).sum() == 6
    assert (example.input_ids == tokenizer.id("<|video_pad|>")).sum() == t * h * w // 4
    assert example.position_ids.shape == (3, len(example))
    assert example.loss_mask.sum() == len(tokenizer.encode("a ball")) + 1
    start = int((example.input_ids == tokenizer.id("<|video_pad|>")).nonzero()[0])
    rows = example.position_ids[0, start :: h * w // 4][:t] - example.position_ids[0, start]
    assert rows.tolist() == list(range(t))  # 8 frames in 4 s, 2 positions a second


def test_frames_are_shown_in_the_order_asked_for(tokenizer):
    plain = prepare(ask(VIDEO), PROCESSOR, tokenizer, load)
    order = [5, 0, 7, 2, 1, 3, 6, 4]
    mixed = prepare(ask(VIDEO | {"frames": order}), PROCESSOR, tokenizer, load)
    assert torch.equal(mixed.position_ids, plain.position_ids)  # time follows the order shown
    size = PLAN.grid[1] * PLAN.grid[2]
    assert mixed.pixel_values[::size, 0].tolist() == order
    part = prepare(ask(VIDEO | {"frames": [6, 1]}), PROCESSOR, tokenizer, load)
    assert part.grid_thw.tolist() == [[2, *PLAN.grid[1:]]]
    with pytest.raises(BadSample, match="'frames' is not an order of the 8 sampled frames"):
        prepare(ask(VIDEO | {"frames": [8]}), PROCESSOR, tokenizer, load)


def test_truncated_media_leave_no_trace(tokenizer):
    messages = [*ask(IMAGE), *ask(VIDEO)]
    first = prepare(messages[:2], PROCESSOR, tokenizer, load)
    cut = prepare(messages, PROCESSOR, tokenizer, load, max_tokens=len(first) + 20)
    for name in ("input_ids", "loss_mask", "position_ids", "pixel_values", "grid_thw"):
        assert torch.equal(getattr(cut, name), getattr(first, name)), name
    assert cut.turns == 2


def test_text_alone(tokenizer):
    example = prepare([{"role": "text", "content": "a ball"}], PROCESSOR, tokenizer, load)
    assert example.pixel_values.shape == (0, 588) and example.grid_thw.shape == (0, 3)
    assert example.position_ids.tolist() == [list(range(len(example)))] * 3


def test_join_keeps_segments_apart(tokenizer):
    examples = [prepare(m, PROCESSOR, tokenizer, load) for m in (ask(IMAGE), ask(), ask(VIDEO, IMAGE))]
    batch = join(examples, ["a#0", "b#0", "c#0"])
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *(len(e) for e in examples)]).tolist()
    assert len(batch.grid_thw) == 3 and batch.draws == ["a#0", "b#0", "c#0"]
    assert len(batch.pixel_values) == sum(int(g.prod()) for g in batch.grid_thw)
    for i, example in enumerate(examples):
        a, b = batch.cu_seqlens[i : i + 2].tolist()
        assert torch.equal(batch.input_ids[a:b], example.input_ids)
        assert torch.equal(batch.position_ids[:, a:b], example.position_ids)
    assert batch.target_mask().sum() == batch.loss_mask.sum()
    with pytest.raises(UserError, match="no examples"):
        join([])


@pytest.mark.parametrize(
    ("loaded", "why"),
    [((np.zeros((8, 56, 84, 3), np.uint8), None), "no video plan"),
     ((np.zeros((3, 56, 84, 3), np.uint8), PLAN), "3 frames where the plan says 8"),
     ((np.zeros((8, 50, 84, 3), np.uint8), PLAN), "multiples of 28")],
)  # fmt: skip
def test_a_loader_must_keep_its_word(loaded, why, tokenizer):
    with pytest.raises(UserError, match=why):
        prepare(ask(VIDEO), PROCESSOR, tokenizer, lambda part: loaded)


def test_counts_from_metadata_equal_decoding_on_all_real_media(shared_data, tokenizer):
    videos = [p for p in sorted((shared_data / "videos").glob("*/*")) if p.suffix in (".mp4", ".mov", ".mkv", ".avi")]
    images = [*sorted((shared_data / "images/photos").glob("*")), *sorted((shared_data / "videos").glob("*/*.jpg"))]
    flickr = sorted(p for p in (shared_data / "images/flickr8k_1000").rglob("*") if p.suffix in (".jpg", ".jpeg"))
    tiny = Processor(
        image_max_tokens=25, video_max_frames=4, frame_min_tokens=4, frame_max_tokens=9, video_max_tokens=32
    )
    load_file, done = file_loader(shared_data, tiny), 0
    for path in [*videos, *images, *flickr[:20]]:
        name, kind = str(path.relative_to(shared_data)), "video" if path in videos else "image"
        if kind == "video":
            facts = {"kind": kind, **vars(video_info(path))}
        else:
            facts = {"kind": kind, **dict(zip(("width", "height"), image_size(path), strict=True))}
        messages = ask({"type": kind, kind: name})
        planned = media_grids(messages, {name: facts}, tiny)
        try:
            example = prepare(messages, tiny, tokenizer, load_file)
        except BadSample as e:
            assert (path.name, e.reason) == ("corrupted.mp4", "damaged video")
            continue
        assert [tuple(g) for g in example.grid_thw.tolist()] == planned, name
        sample = {"messages": messages, "media": {name: facts}}
        visual = sum(media_tokens(messages, {name: facts}, tiny))
        assert sample_tokens(sample, tiny, tokenizer) == (len(example), visual)
        done += 1
    assert done >= 45


def test_counts_follow_the_frame_order():
    facts = {"mp4": {"kind": "video", **vars(CLIP)}}
    assert media_grids(ask(VIDEO), facts, PROCESSOR) == [PLAN.grid]
    assert media_grids(ask(VIDEO | {"frames": [3, 1]}), facts, PROCESSOR) == [(2, *PLAN.grid[1:])]


@pytest.mark.parametrize(
    ("facts", "why"),
    [({}, "media 'mp4' is not in the sample"), ({"mp4": {"kind": "image", "width": 9, "height": 9}}, "not of kind"),
     ({"mp4": {"kind": "video", "width": 9}}, "media facts lack 'height'"), ({"mp4": 3}, "not in the sample"),
     ({"mp4": {"kind": "video", **vars(CLIP), "fps": "x"}}, "not numbers")],
)  # fmt: skip
def test_bad_facts(facts, why):
    with pytest.raises(BadSample, match=why):
        media_tokens(ask(VIDEO), facts, PROCESSOR)


def test_files_stay_inside_their_folder(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / "out.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    load_file = file_loader(tmp_path / "in", PROCESSOR)
    assert isinstance(prepare(ask({"type": "image", "image": "a.png"}), PROCESSOR, tokenizer, load_file), Example)
    for name in ("../out.png", str(tmp_path / "out.png"), "link.png"):
        with pytest.raises(BadSample, match="leads out of its folder"):
            prepare(ask({"type": "image", "image": name}), PROCESSOR, tokenizer, load_file)
