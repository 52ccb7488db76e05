"""Everything bad at once, from the file on disk to the loader: skipped, counted and named, and nothing hangs.

Which test holds which kind of bad input is listed in tests/README.md.
"""

import io
import json
import signal
import struct
import tarfile

import av
import numpy as np
import pytest

from data_mix.importers import import_data
from data_mix.index import build_index
from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.shards import ShardWriter, Source
from mm.common.errors import BadSample, UserError
from tests.data_mix.made import clip, picture, turn
from tests.data_mix.test_importers import run, talk
from tests.data_mix.test_index import add, good, jpeg, pair
from tests.vision.test_media import _audio_only, _png
from tests.vision.test_media import clip as brightening
from vision.media import read_frames, video_info


@pytest.fixture(autouse=True)
def _deadline():
    """Nothing here may hang."""
    def late(*_):
        raise TimeoutError("this test should have ended long ago")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def raw_avi(width, height, frames=2):
    """An uncompressed clip: its size stands in plain numbers in the header."""
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as container:
        stream = container.add_stream("rawvideo", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), "rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return out.getvalue()


def sizeless_avi():
    """The same with 0x0 in the stream's header (BITMAPINFOHEADER: size 40, width, height) and the file's."""
    raw = raw_avi(64, 48)
    return raw.replace(struct.pack("<Iii", 40, 64, 48), struct.pack("<Iii", 40, 0, 0)).replace(
        struct.pack("<II", 64, 48), struct.pack("<II", 0, 0)
    )


BAD = {
    "empty.mp4": b"", "blank.jpg": b"", "truncated.mp4": brightening(faststart=True)[:-600],
    "cut.jpg": jpeg((300, 300))[:2000], "text.mp4": b"I am a text file\n" * 20, "words.jpg": b"I am text",
    "sound.mp4": _audio_only(), "frameless.mp4": brightening(n=0, faststart=True), "flat.png": _png(0, 0),
    "sizeless.avi": sizeless_avi(), "broad.png": _png(60000, 10), "wide.avi": raw_avi(60000, 2),
}  # fmt: skip
REASONS = {
    "empty.mp4": "empty file", "blank.jpg": "empty file", "truncated.mp4": "truncated video",
    "cut.jpg": "damaged image", "text.mp4": "not a video", "words.jpg": "not an image",
    "sound.mp4": "no video stream", "frameless.mp4": "no video stream|0 frames|not a video|empty file",
    "flat.png": "0x0 px has no area|not an image", "sizeless.avi": "has no area|not a video|damaged video",
    "broad.png": "60000x10 px is beyond 32768 px a side", "wide.avi": "60000x2 px is beyond 32768 px a side",
}  # fmt: skip
GOOD = {"mute.mp4": clip(1), "photo.png": picture(2)}  # a clip without sound is a good clip


def test_a_folder_of_bad_media_and_two_good_ones(tmp_path, processor, tokenizer):
    (tmp_path / "in").mkdir()
    for name, data in {**BAD, **GOOD}.items():
        (tmp_path / "in" / name).write_bytes(data)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"this is {name.split('.')[0]}")
    report, source = run("folder", tmp_path / "in", tmp_path / "out")
    told = json.loads((tmp_path / "out/skipped.json").read_text())
    found = {row["key"].split("-", 1)[1]: row["reason"] for row in told}
    for name, reason in REASONS.items():
        assert _any(reason, found[name.split(".")[0]]), name
    assert len(report.skipped) == len(BAD) and all(b.shard and b.key for b in report.skipped)
    assert {row["sample"]["meta"]["file"] for row in source.rows()} == set(GOOD)
    mute = next(r["sample"] for r in source.rows() if r["sample"]["meta"]["file"] == "mute.mp4")
    assert mute["media"]["0.mp4"]["audio"] is False
    assert "x empty file" in str(report)
    plan = PackPlan(Mix([SourceSpec(tmp_path / "out")]), processor, tokenizer, 400, 200)
    with Loader(plan, packs_per_step=1, workers=1) as loader:
        batch = next(loader)[0]
    assert batch.loss_mask.any() and not loader.stats.bad


def _any(wanted, reason):
    return any(part in reason for part in wanted.split("|"))


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_media_in_a_tar_are_skipped_alike(tmp_path, name):
    """The same through WebDataset, where the header of each medium is read while the tar is indexed."""
    suffix = name.rsplit(".", 1)[1]
    kind = "image" if suffix in ("jpg", "png") else "video"
    turns = [{"role": "user", "content": [{"type": kind, kind: suffix}]}, {"role": "assistant", "content": "x"}]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, f"bad.{suffix}", BAD[name])
        add(tar, "bad.json", json.dumps({"messages": turns}).encode())
        pair(tar, "fine")
    _, bad = build_index(tmp_path, "foreign")
    assert "fine" in Source(tmp_path).keys
    if name == "cut.jpg":  # its header is whole: decoding finds it, in lint --decode or in the loader
        assert not bad
    else:
        assert [b.key for b in bad] == ["bad"] and _any(REASONS[name], bad[0].reason)


def test_headers_that_lie_about_their_size_are_not_believed():
    for name in ("sizeless.avi", "wide.avi"):
        for read in (video_info, lambda raw: read_frames(raw, [0])):
            with pytest.raises(BadSample, match=REASONS[name]):
                read(BAD[name])


def test_json_of_every_wrong_kind(tmp_path):
    """Broken, cut short, not UTF-8, without keys, with a key twice; a byte-order mark is no mistake."""
    lines = {
        b'{"messages": [': "broken JSON", b"\xff\xfe{}": "text is not UTF-8", b"{}": "no messages",
        b'{"messages": [{"role": "user"}, {"role": "assistant"}]}': "content is neither text nor a list of parts",
        b'{"messages": [], "messages": 1}': "a JSON key comes twice",
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}': "a JSON key comes twice",
    }  # fmt: skip
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([json.dumps(talk("fine")).encode(), *lines]))
    report, source = run("llava", tmp_path / "d.jsonl", tmp_path / "out")
    assert [b.reason for b in report.skipped] == list(lines.values()) and len(source) == 1
    rows = b"[" + json.dumps(talk("fine")).encode() + b', {"messages": [], "messages": 1}]'
    (tmp_path / "d.json").write_bytes(rows)
    report, source = run("llava", tmp_path / "d.json", tmp_path / "again")
    assert report.reasons() == {"a JSON key comes twice": 1} and len(source) == 1
    (tmp_path / "half.json").write_bytes(rows[:40])
    with pytest.raises(UserError, match=r"half\.json is not JSON"):
        import_data("llava", tmp_path / "half.json", tmp_path / "none", quiet=True)


def test_a_json_key_twice_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "twice.json", good()[:-1] + b', "media": {}}')
        add(tar, "twice.jpg", jpeg())
        pair(tar, "fine")
    _, bad = build_index(tmp_path, "foreign")
    assert [(b.key, b.reason) for b in bad] == [("twice", "a JSON key comes twice")]
    assert Source(tmp_path).keys == ["fine"]


def test_a_shard_cut_short_under_a_running_loader(tmp_path, processor, tokenizer):
    """The source was good when it was opened; the disk loses its tail: holes, counted, and the run goes on."""
    with ShardWriter(tmp_path / "s", "s") as w:
        for i in range(12):
            w.write(f"k{i:02d}", {"messages": turn("a red circle", "png")}, {"png": picture(i)})
    plan = PackPlan(Mix([SourceSpec(tmp_path / "s")]), processor, tokenizer, 200, 100)
    shard = tmp_path / "s/shard-00000.tar"
    with open(shard, "r+b") as f:
        f.truncate(shard.stat().st_size * 3 // 4)
    with Loader(plan, packs_per_step=1, workers=1) as loader:
        drawn = [name for _ in range(6) for b in next(loader) for name in b.draws]
    assert set(loader.stats.bad) == {"the shard ends early"} and drawn
    assert loader.stats.examples["the shard ends early"][0].startswith("s/shard-00000.tar/k")
