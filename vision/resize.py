"""How large a picture becomes, how many frames a clip gives, and the resizing itself."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from mm.common.errors import BadSample

MAX_ASPECT = 200  # a longer strip has no sensible patch grid (Keye-VL's own limit)


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The (height, width) in pixels, multiples of `factor`, nearest to the aspect ratio and within the budget.

    A side shorter than `factor` is first enlarged to it, keeping the shape (Keye-VL preprocessing). The upper
    bound always holds for a picture that is shrunk; one that is enlarged to `min_pixels` is rounded up and may
    pass a `max_pixels` close to it, so that callers with a hard budget check again.

    Raises:
        BadSample: a side is not positive, or the aspect ratio is beyond 200.
    """
    if height < 1 or width < 1:
        raise BadSample(f"{width}x{height} px has no area")
    if height < factor:
        height, width = factor, round(width * factor / height)
    if width < factor:
        height, width = round(height * factor / width), factor
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise BadSample(f"aspect ratio {aspect:.0f} > {MAX_ASPECT}")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(math.floor(side / shrink / factor), 1) * factor for side in (height, width))
        most = max(max_pixels // factor // factor, 1) * factor  # the other side, where one has shrunk to `factor`
        h, w = (h, min(w, most)) if h == factor else (min(h, most), w) if w == factor else (h, w)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, rounded and clamped: uint8 [T, H, W, 3] -> uint8 [T, height, width, 3]."""
    if frames.shape[1:3] == (height, width):
        return frames
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # [T, 3, H, W], channels last
    x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def sample_frames(
    frames: int, fps: float, *, target_fps: float, min_frames: int, max_frames: int
) -> tuple[np.ndarray, float]:
    """Which frames of a clip are looked at: an even number, evenly spaced from the first to the last.

    Follows Keye-VL Preview: `target_fps` frames a second, at least `min_frames`, at most `max_frames`, never
    more than there are (a clip shorter than `min_frames` repeats none; a single frame stays one).

    Returns: int64 [T] rising indices, and the frames a second that they come to.
    Raises BadSample for a clip without frames or without a frame rate.
    """
    if frames < 1:
        raise BadSample("0 frames")
    if not (math.isfinite(fps) and fps > 0):
        raise BadSample("no frame rate")
    wanted = min(max(frames / fps * target_fps, min_frames), max_frames, frames)
    count = max(int(wanted) // 2 * 2, min(2, frames))
    indices = np.linspace(0, frames - 1, count).round().astype(np.int64)
    return indices, count / frames * fps
