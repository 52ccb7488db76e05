"""The only authority on sizes: how a picture or clip becomes patches, and how many tokens it costs."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm.common.config import from_dict, to_dict
from mm.common.errors import BadSample, UserError
from mm.common.files import read_json, write_json
from vision.media import Source, VideoInfo, image_size, read_image, read_video
from vision.resize import resize_frames, sample_frames, smart_resize

CODE_VERSION = 1  # part of the hash: raise it when the same settings give other pixels than before

Grid = tuple[int, int, int]  # (t, h, w) in patches


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """What is looked at of one clip. `indices` int64 [T] frame numbers in the order shown; `times` float64 [T]
    seconds into the clip of those frames; `fps` the rate of the sampled frames; height, width in px."""

    indices: np.ndarray
    times: np.ndarray
    fps: float
    grid: Grid
    height: int
    width: int

    @property
    def seconds_per_frame(self) -> float:
        return 1.0 / self.fps

    def reordered(self, order: list[int]) -> "VideoPlan":
        """Only the sampled frames named in `order` (0 = the first), in that order: for frame re-ordering tasks.

        Raises BadSample unless `order` names different ones of them.
        """
        frames = self.grid[0]
        numbers = isinstance(order, list) and bool(order) and all(type(i) is int for i in order)
        if not numbers or len(set(order)) < len(order) or min(order) < 0 or max(order) >= frames:
            raise BadSample(f"'frames' is not an order of the {frames} sampled frames")
        return dataclasses.replace(
            self, indices=self.indices[order], times=self.times[order], grid=(len(order), *self.grid[1:])
        )


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Sizes and rates. Defaults are Keye-VL Preview's (tokens are merged tokens: 28 x 28 px each).

    Where we differ on purpose: Keye's released rule allows each frame twice the budget's share (a "* 2" that
    comes from models which merge two frames into one token). Here `video_max_tokens` really is the most that a
    clip costs: a frame gets at most its share, and where even `frame_min_tokens` a frame would be too many,
    fewer frames are sampled.
    """

    patch_size: int = 14  # px
    merge_size: int = 2  # patches a side that become one token
    image_min_tokens: int = 4
    image_max_tokens: int = 16384
    video_fps: float = 2.0
    video_min_frames: int = 4
    video_max_frames: int = 768
    frame_min_tokens: int = 128
    frame_max_tokens: int = 768
    video_max_tokens: int = 24576
    tokens_per_second: int = 2  # temporal positions a second (mRoPE)

    def __post_init__(self) -> None:
        if type(self.video_fps) is int:  # so that 2 and 2.0 have one hash
            object.__setattr__(self, "video_fps", float(self.video_fps))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"processor.{f.name} = {value!r}: must be a number above 0")
            if f.type is int and not isinstance(value, int):
                raise UserError(f"processor.{f.name} = {value!r}: must be a whole number")
        pairs = [("image_min_tokens", "image_max_tokens"), ("video_min_frames", "video_max_frames"),
                 ("frame_min_tokens", "frame_max_tokens"), ("frame_min_tokens", "video_max_tokens")]  # fmt: skip
        for low, high in pairs:
            if getattr(self, low) > getattr(self, high):
                raise UserError(f"processor.{low} is above processor.{high}; lower one or raise the other")

    @property
    def factor(self) -> int:
        """px a side of one token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def hash(self) -> str:
        """12 hex digits over every field and the version of this code; names caches and token counts."""
        text = json.dumps({**to_dict(self), "code": CODE_VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / "processor.json", to_dict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "Processor":
        """Raises UserError where the file is missing or has an unknown key."""
        path = Path(folder) / "processor.json"
        data = read_json(path)
        if not isinstance(data, dict):
            raise UserError(f"{path} does not hold an object")
        return from_dict(cls, data, where=str(path))

    # ---- sizes, from width and height alone

    def _resized(self, width: int, height: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
        area = self.factor**2
        return smart_resize(
            height, width, factor=self.factor, min_pixels=min_tokens * area, max_pixels=max_tokens * area
        )

    def _grid(self, frames: int, height: int, width: int) -> Grid:
        return frames, height // self.patch_size, width // self.patch_size

    def image_grid(self, width: int, height: int) -> Grid:
        """(1, h, w) in patches of a picture of this many px. Raises BadSample."""
        return self._grid(1, *self._resized(width, height, self.image_min_tokens, self.image_max_tokens))

    def video_plan(self, info: VideoInfo) -> VideoPlan:
        """Frames and size for a clip, from its facts alone (Keye-VL Preview sampling). Raises BadSample."""
        most = max(min(self.video_max_frames, self.video_max_tokens // self.frame_min_tokens), 1)
        while True:
            indices, fps = sample_frames(
                info.frames, info.fps, target_fps=self.video_fps,
                min_frames=min(self.video_min_frames, most), max_frames=most,
            )  # fmt: skip
            share = max(min(self.frame_max_tokens, self.video_max_tokens // len(indices)), self.frame_min_tokens)
            height, width = self._resized(info.width, info.height, self.frame_min_tokens, share)
            grid = self._grid(len(indices), height, width)
            if self.tokens(grid) <= self.video_max_tokens or len(indices) <= 2:
                break
            most = len(indices) - 2  # rounding up to whole tokens went over the budget
        return VideoPlan(
            indices=indices, times=indices / info.fps, fps=fps, grid=grid, height=height, width=width
        )

    def tokens(self, grid: Grid) -> int:
        """Tokens that a (t, h, w) patch grid becomes in the decoder."""
        t, h, w = grid
        return t * (h // self.merge_size) * (w // self.merge_size)

    # ---- pixels

    def load_image(self, src: Source) -> np.ndarray:
        """uint8 [1, h, w, 3], resized. Raises BadSample."""
        width, height = image_size(src)
        _, h, w = self.image_grid(width, height)
        return resize_frames(read_image(src)[None], h * self.patch_size, w * self.patch_size)

    def load_video(self, src: Source) -> tuple[np.ndarray, VideoPlan]:
        """uint8 [T, h, w, 3], resized, and the plan it follows. Raises BadSample."""
        plans: list[VideoPlan] = []

        def choose(info: VideoInfo) -> tuple[np.ndarray, tuple[int, int]]:
            plans.append(self.video_plan(info))
            return plans[0].indices, (plans[0].height, plans[0].width)

        frames, _ = read_video(src, choose)
        return frames, plans[0]

    def frames_grid(self, frames: np.ndarray) -> Grid:
        """The patch grid of frames that are already resized. Raises UserError where they are not."""
        t, height, width, channels = frames.shape
        if frames.dtype != np.uint8 or channels != 3 or height % self.factor or width % self.factor:
            raise UserError(
                f"frames {frames.shape} {frames.dtype}: want uint8 [T, h, w, 3], sides multiples of {self.factor}"
            )
        return self._grid(t, height, width)

    def patchify(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, h, w, 3] -> uint8 [N, 3 * patch * patch]: raster order, each (channel, row, column)."""
        p, (t, h, w) = self.patch_size, self.frames_grid(frames)
        x = frames.reshape(t, h, p, w, p, 3).transpose(0, 1, 3, 5, 2, 4)  # [t, h, w, 3, p, p]
        return x.reshape(t * h * w, self.patch_dim)
