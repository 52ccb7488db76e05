"""Reading pictures and clips that nobody has checked: the right pixels, or BadSample with a short reason.

Headers are judged before anything is decoded, formats that name other files (playlists, EPS) are not opened,
and the libraries' own chatter is silenced. Clips go through decord where it is known to agree with PyAV bit
for bit, and through PyAV everywhere else (10 bit, AV1, clips without time stamps, any decord error).
"""

import bisect
import contextlib
import io
import itertools
import math
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from mm.common.errors import BadSample
from vision.resize import MAX_ASPECT, resize_frames

try:
    import decord
except ImportError:  # no wheel for this platform: PyAV reads everything
    decord = None

Source = str | Path | bytes

MAX_SIDE = 32768  # px
MAX_PIXELS = 2**27  # px of one picture or frame: 400 MB as RGB
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,gif,h264,hevc,ivf"
CHUNK = 16  # frames held at native size while they are resized

_stderr_lock = threading.Lock()

av.logging.set_level(None)
if decord is not None:
    decord.logging.set_level(decord.logging.QUIET)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadSample(f"{width}x{height} px has no area")
    if max(width, height) > MAX_SIDE:
        raise BadSample(f"{width}x{height} px is beyond {MAX_SIDE} px a side")
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width}x{height} px is beyond {MAX_PIXELS} px")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(f"aspect ratio {max(width, height) / min(width, height):.0f} > {MAX_ASPECT}")


def _bytes_of(src: Source) -> BinaryIO:
    """An open file on `src`; a str is always a local path, never a URL."""
    if isinstance(src, bytes):
        file: BinaryIO = io.BytesIO(src)
    else:
        try:
            file = open(src, "rb")  # noqa: SIM115 (the caller closes it)
        except (OSError, ValueError) as e:
            raise BadSample("no such file" if isinstance(e, FileNotFoundError) else "file cannot be read") from e
    if not file.read(1):
        file.close()
        raise BadSample("empty file")
    file.seek(0)
    return file


# ---- pictures

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@contextlib.contextmanager
def _picture(src: Source) -> Iterator[tuple[Image.Image, int]]:
    """An opened, size-checked, not yet decoded picture and its EXIF orientation (1 = upright)."""
    Image.init()
    formats = [f for f in IMAGE_FORMATS if f in Image.OPEN]
    with _bytes_of(src) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of big pictures and odd EXIF; we judge the size ourselves
        try:
            image = Image.open(file, formats=formats)
            orientation = _orientation(image)
        except Image.DecompressionBombError as e:
            raise BadSample(f"beyond {MAX_PIXELS} px") from e
        except Exception as e:
            raise BadSample("not an image") from e
        _check_size(*image.size)
        try:
            yield image, orientation
        except BadSample:
            raise
        except Exception as e:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
            raise BadSample("damaged image") from e


def _orientation(image: Image.Image) -> int:
    """From the header alone (Pillow's getexif would decode a PNG). TIFF pictures are turned by Pillow itself."""
    raw = image.info.get("exif")
    if image.format == "TIFF" or not raw:
        return 1
    exif = Image.Exif()
    try:
        exif.load(raw)
        return int(exif.get(0x0112, 1))
    except Exception:  # broken EXIF is no reason to lose the picture
        return 1


def image_size(src: Source) -> tuple[int, int]:
    """(width, height) in pixels as shown, from the header. Raises BadSample."""
    with _picture(src) as (image, orientation):
        return (image.height, image.width) if 5 <= orientation <= 8 else (image.width, image.height)


def read_image(src: Source) -> np.ndarray:
    """uint8 [H, W, 3], RGB, upright; the first frame of an animation; transparency over white. Raises BadSample."""
    with _picture(src) as (image, orientation):
        rgb = _to_rgb(image)
        turn = _TURNS.get(orientation)
        return np.array(rgb if turn is None else rgb.transpose(turn), dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadSample("float pixels")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's convert would clip at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ---- clips


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a clip is before it is decoded. width, height in px as shown; `rotation` in degrees clockwise that
    the reader applies; `fps` is the mean rate, `seconds` = frames / fps; `audio`: has a sound track."""

    width: int
    height: int
    frames: int
    fps: float
    seconds: float
    rotation: int
    audio: bool


@dataclass(frozen=True)
class _Table:
    """Where the frames of a clip are. `pts` rise; None where the container has no usable time stamps.
    `keys`: (rank, seek time) of the key frames, by rank. `decord`: may decord read it?"""

    frames: int
    pts: list[int] | None
    keys: list[tuple[int, int]]
    decord: bool


class _Clip:
    """One opened clip: facts, and frames by number."""

    def __init__(self, src: Source):
        self.src = src
        self.converter = VideoReformatter()
        with _container(src) as (container, stream):
            self.table = _scan(container, stream)
            rate = _rate(stream, self.table)
            audio = bool(container.streams.audio)
        with _container(src) as (container, stream):
            frame = next(container.decode(stream), None)
            if frame is None:
                raise BadSample("0 frames")
            self.turns = round(frame.rotation / 90) % 4  # quarter turns counter-clockwise
            width, height = (frame.height, frame.width) if self.turns % 2 else (frame.width, frame.height)
        _check_size(width, height)
        self.info = VideoInfo(
            width=width, height=height, frames=self.table.frames, fps=rate, seconds=self.table.frames / rate,
            rotation=(360 - 90 * self.turns) % 360, audio=audio,
        )  # fmt: skip

    def read(self, indices: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 [T, H, W, 3] in the order of `indices`, resized to (height, width) as they come."""
        wanted, inverse = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if len(wanted) == 0:
            raise BadSample("0 frames asked for")
        if wanted[0] < 0 or wanted[-1] >= self.info.frames:
            raise BadSample(f"frame {wanted[-1] if wanted[0] >= 0 else wanted[0]} of {self.info.frames}")
        frames = self._decord(wanted, size) if self.table.decord else None
        if frames is None:
            frames = _gather(self._pyav(wanted.tolist()), size)
        if len(frames) != len(wanted):
            raise BadSample("frames are missing")
        if frames.shape[1:3] != (size or (self.info.height, self.info.width)):
            raise BadSample("frame size changes inside the clip")
        return frames if np.array_equal(inverse, np.arange(len(frames))) else frames[inverse]

    def _decord(self, wanted: np.ndarray, size: tuple[int, int] | None) -> np.ndarray | None:
        """None where decord fails or counts other frames than we do: PyAV then has the last word."""
        file = io.BytesIO(self.src) if isinstance(self.src, bytes) else os.path.abspath(self.src)
        chunks = []
        with _silent_stderr():
            try:
                reader = decord.VideoReader(file, num_threads=1)
                if len(reader) != self.info.frames:
                    return None
                for i in range(0, len(wanted), CHUNK):
                    frames = reader.get_batch(wanted[i : i + CHUNK]).asnumpy()
                    chunks.append(frames if size is None else resize_frames(frames, *size))
            except Exception:
                return None
        return np.concatenate(chunks)

    def _pyav(self, wanted: list[int]) -> Iterator[np.ndarray]:
        done = 0
        if self.table.pts is not None:
            with _container(self.src) as (container, stream):
                for frame in _seek_frames(container, stream, self.table, wanted):
                    yield self._pixels(frame)
                    done += 1
        if done < len(wanted):  # time stamps are missing, or the decoder's differ from the container's
            with _container(self.src) as (container, stream):
                for frame in _count_frames(container, stream, wanted[done:]):
                    yield self._pixels(frame)

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.is_corrupt:
            raise BadSample("damaged video")
        # one converter for the clip: PyAV would otherwise make one, with a thread per core, for every frame
        rgb = self.converter.reformat(frame, format="rgb24", threads=1)
        return np.rot90(rgb.to_ndarray(), k=self.turns)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """decord writes some errors to file descriptor 2, whatever its log level; we tell them by BadSample."""
    with _stderr_lock:
        try:
            kept = os.dup(2)
        except OSError:  # there is no stderr to protect
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


@contextlib.contextmanager
def _container(src: Source) -> Iterator[tuple[Any, Any]]:
    """(container, video stream), one thread, no format that may open other files; errors become BadSample."""
    with _bytes_of(src) as file:
        try:
            # through a file object, so that libav itself can reach neither paths nor the network
            container = av.open(file, metadata_errors="replace", options={"format_whitelist": VIDEO_FORMATS})
        except Exception as e:
            raise BadSample("not a video") from e
        with container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1
            try:
                yield container, stream
            except (BadSample, GeneratorExit):
                raise
            except Exception as e:
                raise BadSample("damaged video") from e


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise BadSample("no video stream")
    if stream.codec_context is None:
        raise BadSample("unknown video codec")
    if stream.codec_context.width:  # a stream whose size only its frames tell is judged by its first frame
        _check_size(stream.codec_context.width, stream.codec_context.height)
    return stream


def _scan(container: Any, stream: Any) -> _Table:
    """Count and time every packet without decoding any."""
    codec = stream.codec_context
    packets, seen = [], 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_corrupt:
            continue
        seen += 1
        if not packet.is_discard and _shown(packet, codec.name):
            packets.append((packet.pts, packet.dts, packet.is_keyframe))
    if not packets:
        raise BadSample("0 frames")
    if "mp4" in container.format.name and seen < stream.frames - 1:
        raise BadSample("truncated video")
    stamps = [p[0] for p in packets]
    whole = None not in stamps and len(set(stamps)) == len(stamps)
    plain = codec.name in ("h264", "hevc", "vp9", "mpeg4") and codec.pix_fmt in ("yuv420p", "yuvj420p")
    plain = plain and container.format.name.startswith(("mov", "matroska"))  # in AVI decord counts wrongly
    rank = {pts: i for i, pts in enumerate(sorted(stamps))} if whole else {}
    keys = sorted((rank[p], p if d is None else min(p, d)) for p, d, key in packets if key and whole)
    by_decord = decord is not None and plain and bool(keys) and seen == len(packets)
    return _Table(frames=len(packets), pts=list(rank) if keys else None, keys=keys, decord=by_decord)


def _shown(packet: Any, codec: str) -> bool:
    """False for the packets of VP8 that only update references (bit 4 of its frame tag)."""
    return codec != "vp8" or bool(bytes(packet)[0] & 0x10)


def _rate(stream: Any, table: _Table) -> float:
    """Mean frames a second: the container's figure where it agrees with the time stamps, else theirs."""
    stated = float(stream.average_rate or 0)
    counted = 0.0
    if table.pts is not None and table.frames > 1:
        counted = (table.frames - 1) / float((table.pts[-1] - table.pts[0]) * stream.time_base)
    rate = stated if not counted or abs(stated - counted) < 0.01 * counted else counted
    if not (math.isfinite(rate) and rate > 0):
        raise BadSample("no frame rate")
    return rate


def _seek_frames(container: Any, stream: Any, table: _Table, wanted: list[int]) -> Iterator[av.VideoFrame]:
    """The wanted frames (rising ranks), jumping to a key frame where that saves decoding; stops at a miss."""
    assert table.pts is not None
    rank = {pts: i for i, pts in enumerate(table.pts)}
    starts = [key for key, _ in table.keys]
    decoded, at = container.decode(stream), -1
    for target in wanted:
        nearest = bisect.bisect_right(starts, target) - 1
        if nearest > 0 and starts[nearest] > at + 1:
            container.seek(table.keys[nearest][1], stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            at = rank.get(frame.pts, at)
            if at >= target:
                break
        if at != target or frame.pts != table.pts[target]:
            return
        yield frame


def _count_frames(container: Any, stream: Any, wanted: list[int]) -> Iterator[av.VideoFrame]:
    """The wanted frames by counting from the first: slow, and right for any container."""
    left = set(wanted)
    for number, frame in enumerate(container.decode(stream)):
        if number in left:
            left.discard(number)
            yield frame
        if not left:
            return


def _gather(frames: Iterator[np.ndarray], size: tuple[int, int] | None) -> np.ndarray:
    """Stack, resizing every CHUNK frames so that a long clip never lies in memory at its native size."""
    chunks: list[np.ndarray] = []
    shapes: set[tuple[int, ...]] = set()
    while part := list(itertools.islice(frames, CHUNK)):
        shapes |= {frame.shape for frame in part}
        if len(shapes) > 1:
            raise BadSample("frame size changes inside the clip")
        stacked = np.stack(part)
        chunks.append(stacked if size is None else resize_frames(stacked, *size))
    return np.concatenate(chunks) if chunks else np.empty((0, 0, 0, 3), np.uint8)


def video_info(src: Source) -> VideoInfo:
    """Facts of a clip: every packet is counted, one frame is decoded (for its rotation). Raises BadSample."""
    return _Clip(src).info


def read_frames(src: Source, indices: np.ndarray, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Exactly the frames asked for, upright: uint8 [T, H, W, 3], in the order of int [T] `indices`.

    With `size` = (height, width) each frame is resized on the way, and memory stays small.
    Raises BadSample, also where a single one of them cannot be decoded.
    """
    return _Clip(src).read(np.asarray(indices), size)


def read_video(src: Source, plan: Any) -> tuple[np.ndarray, VideoInfo]:
    """Facts and frames at one opening: `plan(info)` -> (indices, (height, width))."""
    clip = _Clip(src)
    indices, size = plan(clip.info)
    return clip.read(indices, size), clip.info
