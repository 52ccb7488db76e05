"""Frames and sound to the bytes of real files."""

import io
from typing import Any

import av
import numpy as np
from PIL import Image

from data_mix.world.sound import RATE

_AAC = {"aac_coder": "fast", "aac_tns": "0", "aac_is": "0", "aac_ms": "0", "aac_pns": "0"}  # a fifth less time


def jpeg(picture: np.ndarray, quality: int = 88) -> bytes:
    """uint8 [h, w, 3] -> the bytes of a .jpg."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=quality)
    return out.getvalue()


def mp4(frames: list[np.ndarray], fps: int, sound: np.ndarray | None) -> bytes:
    """uint8 [h, w, 3] frames and float [2, samples] sound -> H.264 (yuv420p) and, with sound, stereo AAC in .mp4."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as box:
        video = box.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "22", "g": str(fps)})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # one process per core already
        audio = None
        if sound is not None:
            audio = box.add_stream("aac", rate=RATE, layout="stereo", options=_AAC)
            audio.bit_rate = 48_000
        for frame in frames:
            box.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(video.encode(None))
        if audio is not None and sound is not None:
            _mux_sound(box, audio, sound)
    return out.getvalue()


def _mux_sound(box: Any, audio: Any, sound: np.ndarray) -> None:
    for start in range(0, sound.shape[1], 1024):
        piece = np.ascontiguousarray(sound[:, start : start + 1024], dtype=np.float32)
        part = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
        part.sample_rate, part.pts = RATE, start
        box.mux(audio.encode(part))
    box.mux(audio.encode(None))


def read_mp4(data: bytes) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames uint8 [h, w, 3] and sound float [2, samples] from time 0 (the encoder's run-in is cut)."""
    with av.open(io.BytesIO(data), "r") as box:
        frames = [f.to_ndarray(format="rgb24") for f in box.decode(video=0)]
    with av.open(io.BytesIO(data), "r") as box:
        parts = list(box.decode(audio=0))
    early = max(0, -round((parts[0].time or 0.0) * RATE))
    return frames, np.concatenate([p.to_ndarray() for p in parts], 1)[:, early:]
