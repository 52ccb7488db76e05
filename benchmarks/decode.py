"""Decoded frames a second: our reader against plain decord, PyAV and torchcodec, 16 uniform frames a clip.

Each opens the clip, finds out how many frames it has and returns the same 16 as RGB, on one thread. Ours also
reads every packet's header (a count to be trusted, the rate, the rotation), decodes one frame and checks what
it got; then it hands the frames' decoding to decord. "ours, resized" is what a decode worker does.
PyAV is written as its users write it: one pass over the clip, converting the frames wanted. The order changes
from clip to clip. torchcodec is left out where it is not installed (pip install torchcodec; needs FFmpeg).

    python benchmarks/decode.py --videos ../shared/data/videos/lite
    python benchmarks/decode.py --videos WORLD/clips/train
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import harness
import numpy as np

from mm.common.errors import UserError
from mm.sizes import PROCESSORS
from vision.media import read_frames, read_video, video_info

Reader = Callable[[Path, int], np.ndarray]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--videos", type=Path, required=True, help="a folder of mp4 clips")
    p.add_argument("--clips", type=int, default=24, help="so many of them, by name")
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    return p.parse_args(argv)


def uniform(total: int, wanted: int) -> np.ndarray:
    return np.linspace(0, total - 1, min(wanted, total)).round().astype(np.int64)


def ours(path: Path, wanted: int) -> np.ndarray:
    def plan(info):
        return uniform(info.frames, wanted), (info.height, info.width)

    return read_video(path, plan)[0]


def ours_resized(path: Path, wanted: int) -> np.ndarray:
    def plan(info):
        at = PROCESSORS["tiny"].video_plan(info)
        return uniform(info.frames, wanted), (at.height, at.width)

    return read_video(path, plan)[0]


def by_pyav(path: Path, wanted: int) -> np.ndarray:
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        total = stream.frames
        left = set(uniform(total, wanted).tolist())
        for number, frame in enumerate(container.decode(stream)):
            if number in left:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == len(left):
                break
    return np.stack(found)


def readers() -> tuple[dict[str, Reader], list[str]]:
    """Those that can be had here, and what is missing."""
    found: dict[str, Reader] = {"ours": ours, "ours, resized": ours_resized, "PyAV": by_pyav}
    missing = []
    try:
        import decord

        def by_decord(path: Path, wanted: int) -> np.ndarray:
            reader = decord.VideoReader(str(path), num_threads=1)
            return reader.get_batch(uniform(len(reader), wanted)).asnumpy()

        found["decord"] = by_decord
    except ImportError as e:
        missing.append(f"decord: {e}")
    try:
        from torchcodec.decoders import VideoDecoder

        def by_torchcodec(path: Path, wanted: int) -> np.ndarray:
            decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="exact")
            indices = uniform(decoder.metadata.num_frames, wanted)
            return decoder.get_frames_at(indices.tolist()).data.numpy()

        found["torchcodec"] = by_torchcodec
    except (ImportError, RuntimeError, OSError) as e:  # not installed, or no FFmpeg that it knows
        missing.append(f"torchcodec: {str(e).splitlines()[0]}")
    return found, missing


def clips(a: argparse.Namespace) -> list[Path]:
    paths = sorted(a.videos.glob("*.mp4"))[: a.clips]
    if not paths:
        raise UserError(f"--videos {a.videos}: no .mp4 in it")
    return paths


def agreement(found: dict[str, Reader], paths: list[Path], wanted: int) -> dict[str, float]:
    """Share of clips of which a reader returns, frame for frame, what ours does (mean difference below 3 of 255:
    colour conversions differ a little, a wrong frame differs a lot)."""
    same = dict.fromkeys(found, 0)
    for path in paths:
        want = read_frames(path, uniform(video_info(path).frames, wanted)).astype(np.int16)
        for name, reader in found.items():
            try:
                got = reader(path, wanted)
            except Exception:  # a peer's failure is a figure here
                continue
            if got.shape == want.shape:
                same[name] += bool((np.abs(got - want).mean((1, 2, 3)) < 3).all())
    return {name: n / len(paths) for name, n in same.items()}


def timed(reader: Reader, path: Path, wanted: int) -> tuple[int, float, float]:
    """(frames, seconds, CPU seconds); no frames where the reader fails."""
    start = harness.now()
    try:
        n = len(reader(path, wanted))
    except Exception:  # BadSample of ours, or what a peer raises; `agreement` tells of it
        n = 0
    end = harness.now()
    return n, end[0] - start[0], end[1] - start[1]


def measure(a: argparse.Namespace, found: dict[str, Reader], paths: list[Path]) -> dict[str, dict[str, list[float]]]:
    """Frames a second by the clock and by CPU time: kind -> reader -> one figure a round."""
    names = list(found)
    speeds: dict[str, dict[str, list[float]]] = {kind: {n: [] for n in names} for kind in ("clock", "cpu")}
    for r in range(a.rounds):
        sums = {name: np.zeros(3) for name in names}
        for i, path in enumerate(paths):
            k = (r + i) % len(names)
            for name in names[k:] + names[:k]:
                sums[name] += timed(found[name], path, a.frames)
        for name in names:
            speeds["clock"][name].append(sums[name][0] / sums[name][1])
            speeds["cpu"][name].append(sums[name][0] / sums[name][2])
    return speeds


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    a.threads = a.threads or 1
    harness.begin(a)
    about = harness.machine()
    found, missing = readers()
    paths = clips(a)
    same = agreement(found, paths, a.frames)  # also opens every file once: none is read cold
    speeds = measure(a, found, paths)
    ratio = {kind: {n: harness.ratios(s["ours"], s[n]) for n in found if n != "ours"} for kind, s in speeds.items()}
    rows = [
        (name, harness.shown(harness.spread(speeds["clock"][name]), ".0f"),
         *(harness.shown(ratio[kind][name]) if name != "ours" else "" for kind in ("clock", "cpu")),
         "" if name == "ours, resized" else f"{same[name]:.0%} of clips")
        for name in found
    ]  # fmt: skip
    notes = [f"{len(paths)} clips, {a.rounds} rounds; left out: {'; '.join(missing) or 'nothing'}"]
    columns = ("reader", "frames/s (least to most)", "ours / this, by clock", "by CPU time", "same frames")
    figures = {"speeds": speeds, "ratios": ratio, "agreement": same, "missing": missing}
    return harness.report(a, f"decoding {a.frames} uniform frames", about, columns, rows, figures, notes)


if __name__ == "__main__":
    harness.run(main)
