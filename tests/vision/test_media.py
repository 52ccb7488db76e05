"""Real and broken pictures and clips: the right pixels or BadSample, and nothing else."""

import contextlib
import io
import os
import random
import struct
import tempfile
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mm.common.errors import BadSample
from vision import media
from vision.media import image_size, read_frames, read_image, read_video, video_info

# ---- pictures


def _bytes(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _png(width: int, height: int) -> bytes:
    """A PNG whose header claims any size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _noise(mode: str, size=(30, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "PNG"), ("RGB", "BMP"), ("RGB", "WEBP"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"),
     ("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"),
     ("L", "JPEG"), ("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("LAB", "TIFF"), ("RGB", "PPM")],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode, form):
    picture = _noise("L" if mode.startswith("I") else "RGB" if mode == "LAB" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) << 8)
    elif mode == "I":
        picture = Image.fromarray(np.asarray(picture).astype(np.int32) << 8)
    raw = _bytes(picture, form)
    got = read_image(raw)
    assert got.shape == (20, 30, 3) and got.dtype == np.uint8
    assert image_size(raw) == (30, 20)
    if mode.startswith("I"):
        assert np.array_equal(got[..., 0], np.asarray(_noise("L")))  # scaled, not clipped


def test_transparency_lies_over_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read_image(_bytes(clear, "PNG")) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9] * 256)
    assert (read_image(_bytes(palette, "PNG", transparency=0)) == 255).all()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue", "green")]
    for form in ("GIF", "WEBP", "PNG"):
        raw = _bytes(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(read_image(raw)[0, 0].astype(int) - [255, 0, 0]).max() < 6, form


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(form):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # a white corner at the top left
    stored = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
              5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, 1),
              7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: lambda x: np.rot90(x, -1)}  # fmt: skip
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(turn(upright)))
        raw = _bytes(image, form, exif=exif, **({"quality": 100} if form in ("JPEG", "WEBP") else {}))
        got = read_image(raw)
        assert image_size(raw) == (32, 16), orientation
        assert got.shape == upright.shape
        assert np.abs(got.astype(int) - upright).mean() < 8, orientation


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"), (b"hello", "not an image"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (_png(60000, 10), "60000x10 px is beyond 32768 px a side"), (_png(30000, 30000), "beyond 134217728 px"),
        (_png(12500, 12500), "12500x12500 px is beyond 134217728 px"), (_png(3000, 10), "aspect ratio 300 > 200"),
        (_png(0, 0), "0x0 px has no area|not an image"), (_png(50, 50), "damaged image"),
        (b"GIF89a\0\0\0\0\0\0\0;", "0x0 px has no area|not an image"), (b"P6 0 0 255\n", "not an image|no area"),
        (_bytes(_noise("RGB", (90, 90)), "JPEG")[:900], "damaged image"),
        (_bytes(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "float pixels"),
    ],
)  # fmt: skip
def test_bad_pictures_are_refused(raw, reason, capfd, recwarn):
    with pytest.raises(BadSample, match=reason) as caught:
        read_image(raw)
    assert len(caught.value.reason) < 80
    if "damaged" not in reason and "float" not in reason:
        with pytest.raises(BadSample, match=reason):
            image_size(raw)
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0


def test_missing_paths(tmp_path):
    for read in (read_image, image_size, video_info):
        for path, reason in [(tmp_path / "no", "no such file"), (tmp_path, "cannot be read"), ("a\0b", "cannot"),
                             ("http://host/a.jpg", "no such file")]:  # fmt: skip
            with pytest.raises(BadSample, match=reason):
                read(path)


def test_real_pictures(shared_data):
    for path in [*(shared_data / "images/photos").glob("*.jpg"), *(shared_data / "videos/llm_demo").glob("*.jpg")]:
        got = read_image(path)
        assert image_size(path) == (got.shape[1], got.shape[0]) == image_size(path.read_bytes())


# ---- clips


def clip(codec="libx264", form="mp4", *, size=(64, 48), n=40, rate=10, pts=None, faststart=False, **options) -> bytes:
    """A clip whose frame i has brightness 5 * i."""
    out = tempfile.NamedTemporaryFile() if faststart else io.BytesIO()  # noqa: SIM115
    flags = {"movflags": "faststart"} if faststart else {}
    with out, av.open(out.name if faststart else out, "w", format=form, options=flags) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 5 * i % 256, np.uint8), format="rgb24")
            if pts is not None:
                frame.pts = pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(out.name).read_bytes() if faststart else out.getvalue()


CLIP = clip(g="12", bf="2")


def _pyav_only(monkeypatch):
    monkeypatch.setattr(media, "decord", None)


def _brightness(frames):
    return frames.reshape(len(frames), -1).mean(1) / 5


@pytest.mark.parametrize(
    "indices", [[0], [39], [11, 12, 13], [5, 39, 0, 20], [7, 7, 3], list(range(40)), [12, 24, 36]]
)
def test_indices_are_exact_with_either_reader(indices, monkeypatch):
    with_decord = read_frames(CLIP, indices)
    _pyav_only(monkeypatch)
    with_pyav = read_frames(CLIP, indices)
    assert np.allclose(_brightness(with_pyav), indices, atol=0.6)
    assert np.array_equal(with_decord, with_pyav)


@pytest.mark.parametrize(
    ("codec", "form", "options"),
    [("libx264", "matroska", {}), ("libx264", "mov", {"g": "5"}), ("libx264", "mpegts", {}), ("libx264", "flv", {}),
     ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16"}), ("libvpx-vp9", "webm", {}),
     ("mpeg4", "avi", {"bf": "2"}), ("mpeg4", "mp4", {}), ("libx264", "h264", {}), ("libx264", "avi", {"bf": "2"})],
)  # fmt: skip
def test_every_container_counts_and_numbers_alike(codec, form, options):
    try:
        raw = clip(codec, form, **options)
    except av.error.FFmpegError:
        pytest.skip(f"this build of PyAV cannot write {codec} in {form}")
    info = video_info(raw)
    assert (info.frames, info.width, info.height) == (40, 64, 48)
    order = [39, 0, 20, 38, 1]
    assert np.allclose(_brightness(read_frames(raw, order)), order, atol=1)


def test_variable_frame_rate_takes_the_mean():
    pts = np.cumsum([33, 50, 21, 90] * 5).tolist()
    info = video_info(clip(n=20, rate=1000, pts=pts))
    assert info.frames == 20
    assert info.fps == pytest.approx(19 / (pts[-1] - pts[0]) * 1000, rel=0.01)
    assert info.seconds == pytest.approx(20 / info.fps)


def test_resizing_on_the_way_equals_resizing_after(monkeypatch):
    indices = list(range(0, 40))
    after = media.resize_frames(read_frames(CLIP, indices), 28, 56)
    assert np.array_equal(read_frames(CLIP, indices, size=(28, 56)), after)
    frames, info = read_video(CLIP, lambda info: (np.array([0, info.frames - 1]), (28, 56)))
    assert np.array_equal(frames, after[[0, 39]]) and info == video_info(CLIP)
    _pyav_only(monkeypatch)
    assert np.array_equal(read_frames(CLIP, indices, size=(28, 56)), after)


def test_sparse_indices_decode_little(monkeypatch):
    _pyav_only(monkeypatch)
    raw, seen = clip(n=200, g="10", bf="0"), []
    count = media._Clip._pixels
    container = media._container
    monkeypatch.setattr(media._Clip, "_pixels", lambda self, frame: seen.append(frame.pts) or count(self, frame))
    decoded = []

    class Counted:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def decode(self, stream):
            for frame in self.inner.decode(stream):
                decoded.append(frame.pts)
                yield frame

    @media.contextlib.contextmanager
    def counting(src):
        with container(src) as (inner, stream):
            yield Counted(inner), stream

    monkeypatch.setattr(media, "_container", counting)
    read_frames(raw, [3, 101, 199])
    assert len(seen) == 3  # pixels are converted only where asked for
    assert len(decoded) <= 1 + 4 + 2 + 10 + 3  # one for the rotation, then a run from each key frame


def test_rotation(shared_data):
    folder = shared_data / "videos/codec"
    for degrees, size in [(0, (568, 320)), (90, (320, 568)), (180, (568, 320)), (270, (320, 568))]:
        info = video_info(folder / f"video_{degrees}.mov")
        assert (info.rotation, info.width, info.height) == (degrees, *size)


def test_rotation_alike_in_both_readers(shared_data, monkeypatch):
    paths = [shared_data / f"videos/codec/video_{d}.mov" for d in (0, 90, 180, 270)]
    with_decord = [read_frames(p, [0, 2]) for p in paths]
    _pyav_only(monkeypatch)
    for path, expected in zip(paths, with_decord, strict=True):
        assert np.array_equal(read_frames(path, [0, 2]), expected)
        assert expected.shape[1:3] == ((320, 568) if path.stem in ("video_0", "video_180") else (568, 320))


def test_nasa_frames_are_the_published_ones(shared_data):
    oracle = np.load(shared_data / "oracles/official/torchcodec_nasa_frames.npz")
    path = shared_data / "videos/free/nasa_13013.mp4"
    names = [n for n in oracle if n.startswith("stream3.frame")]
    got = read_frames(path, [int(n[-6:]) for n in names])
    for name, frame in zip(names, got, strict=True):
        assert np.array_equal(frame, oracle[name]), name
    info = video_info(path)  # of its two pictures the better one, as ffmpeg chooses
    assert (info.width, info.height, info.frames, info.audio) == (480, 270, 390, True)
    assert info.fps == pytest.approx(30000 / 1001)


def test_all_real_clips_read_alike_with_both_readers(shared_data, monkeypatch, capfd):
    paths = sorted(p for p in (shared_data / "videos").glob("*/*") if p.suffix in (".mp4", ".mov", ".mkv", ".avi"))
    first = {}
    for path in paths:
        info = video_info(path)
        indices = [0, info.frames // 2]
        first[path] = (info, read_frames(path, indices), indices)
        assert first[path][1].shape == (2, info.height, info.width, 3)
    with pytest.raises(BadSample, match="damaged video"):  # its second half
        read_frames(shared_data / "videos/codec/corrupted.mp4", [49])
    assert len(first) >= 40
    _pyav_only(monkeypatch)
    for path, (info, frames, indices) in list(first.items())[::3]:
        raw = path.read_bytes()
        assert video_info(raw) == info
        assert np.array_equal(read_frames(raw, indices), frames), path.name
    assert capfd.readouterr() == ("", "")


def test_what_decord_cannot_read_goes_through_pyav(shared_data):
    counts = {"av1_video.mkv": 125, "h265_10bits.mp4": 30, "h264_10bits.mp4": 30, "h265_video.mp4": 10}
    for name, frames in counts.items():
        path = shared_data / "videos/codec" / name
        assert video_info(path).frames == frames
        assert read_frames(path, [0, frames - 1]).std() > 10


def _audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"), (b"hello, this is text\n" * 50, "not a video"), (bytes(4000), "not a video"),
        (CLIP[: len(CLIP) // 2], "not a video"), (_audio_only(), "no video stream"),
        (clip(faststart=True)[:-600], "truncated video"),
        (clip(n=0, faststart=True), "0 frames|no video stream|not a video|empty file"),
        (_bytes(_noise("RGB"), "JPEG"), "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a video"),
        (clip(size=(6600, 32), n=2), "aspect ratio 206 > 200"),
    ],
)  # fmt: skip
def test_bad_clips_are_refused(raw, reason, capfd, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(raw)
    for src in (raw, tmp_path / "clip.mp4", str(tmp_path / "clip.mp4")):
        with pytest.raises(BadSample, match=reason) as caught:
            video_info(src)
        with pytest.raises(BadSample, match=reason):
            read_frames(src, [0])
        assert "clip" not in caught.value.reason and len(caught.value.reason) < 60
    assert capfd.readouterr() == ("", "")


def test_frames_that_are_not_there():
    for indices in ([40], [-1], []):
        with pytest.raises(BadSample, match="frame"):
            read_frames(CLIP, indices)


def test_damage_anywhere_gives_frames_or_a_bad_sample(capfd):
    draw = random.Random(0)
    source = clip(n=30, g="10", faststart=True)
    for _ in range(60):
        raw = bytearray(source)
        if draw.random() < 0.4:
            raw = raw[: draw.randrange(len(raw))]
        else:
            for _ in range(draw.choice([1, 5, 50])):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
        try:
            info = video_info(bytes(raw))
            frames = read_frames(bytes(raw), [0, info.frames - 1])
            assert frames.shape == (2, info.height, info.width, 3)
        except BadSample as e:
            assert len(e.reason) < 60
    assert capfd.readouterr() == ("", "")


def test_file_descriptors_do_not_leak():
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for raw in (CLIP, CLIP[:900], b"text"):
        for _ in range(5):
            with contextlib.suppress(BadSample):
                read_frames(raw, [0, 30])
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before + 2


def test_a_clip_that_changes_size_is_refused():
    """Two H.264 streams of different size end to end: legal bytes, no clip we could train on."""
    raw = clip(form="h264", n=20, size=(64, 48)) + clip(form="h264", n=40, size=(96, 96))
    assert video_info(raw).frames == 60
    for size in (None, (28, 28)):
        for indices in ([0, 59], list(range(60))):
            with pytest.raises(BadSample, match="frame size changes inside the clip"):
                read_frames(raw, indices, size=size)
    assert read_frames(raw, [0, 19]).shape == (2, 48, 64, 3)
