"""Pictures, clips and sources made on the spot."""

import io
import os
import signal
import time

import av
import numpy as np
from PIL import Image

from data_mix.shards import ShardWriter
from mm.common.errors import BadSample
from mm.processor import Processor


def picture(seed=0, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def clip(seed=0, frames=12, fps=6, size=(64, 48)):
    out, random = io.BytesIO(), np.random.default_rng(seed)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = *size, "yuv420p", 1
        base = random.integers(0, 200, 3, dtype=np.uint8)
        for i in range(frames):
            image = np.broadcast_to(base + np.uint8(4 * i), (size[1], size[0], 3))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return out.getvalue()


def turn(answer, *media, question="what is it?"):
    """One exchange about the members named in `media`."""
    kinds = ["video" if s.endswith("mp4") else "image" for s in media]
    parts = [{"type": k, k: s} for k, s in zip(kinds, media, strict=True)] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def image_facts(width=64, height=48):
    return {"kind": "image", "width": width, "height": height}


def planned_source(folder, lengths, *, images=(0, 1), seed=0):
    """A source for planning alone: `lengths` words of text, a share of `images` facts without real pixels."""
    random = np.random.default_rng(seed)
    with ShardWriter(folder, folder.name) as w:
        for i, length in enumerate(lengths):
            n = int(random.choice(images))
            media = {f"{k}.jpg": b"x" for k in range(n)}
            facts = {s: image_facts(int(random.integers(30, 200)), int(random.integers(30, 200))) for s in media}
            w.write(f"s{i:05d}", {"messages": turn("a " * int(length), *media), "media": facts}, media)
    return folder


HANGS, CRASHES, FAILS, BREAKS = (40, 40), (44, 44), (48, 48), (52, 52)  # sizes of pictures that do so


class TrickyProcessor(Processor):
    """Pictures of some sizes hang, crash, fail or break the decoder."""

    def load_image(self, src):
        from vision.media import image_size

        size = image_size(src)
        if size == HANGS:
            time.sleep(1000)
        if size == CRASHES:
            os.kill(os.getpid(), signal.SIGKILL)
        if size == FAILS:
            raise BadSample("damaged image")
        if size == BREAKS:
            raise ZeroDivisionError
        return super().load_image(src)
