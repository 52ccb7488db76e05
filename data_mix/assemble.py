"""From the draws of a pack to its tensors. A sample that fails leaves a hole of its own size.

The hole: the tokens stay, nothing of them is trained, and the media are grey in the planned grid. So neither
the shapes nor any other sample change when one clip cannot be decoded.
"""

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from data_mix.decode import DecodePool, Job, settle
from data_mix.media_plan import first_media, frames_shape, pair_ids, shown, video_plan
from data_mix.mix import Draw
from data_mix.pack import CONVERSATIONS, PackPlan
from data_mix.regions import in_patches, named_regions, phrase_ids, regions_of, said
from data_mix.sample import media_parts, suffix_of
from mm.batch import Batch, PairBatch, RegionBatch
from mm.common.errors import BadSample
from mm.processor import Processor, VideoPlan
from mm.prompt import Example, join, prepare
from mm.tokenizer import Tokenizer
from mm.told import spell

GREY = 128


@dataclass
class Pending:
    """A drawn sample whose media are on their way: per member, [T, H, W] as planned and the frames to come."""

    draw: Draw
    name: str
    sample: dict[str, Any]
    shapes: dict[str, tuple[int, int, int]]
    frames: "dict[str, Future[np.ndarray]]"


@dataclass
class Made:
    """A finished pack and, per sample in it, (name, reason it became a hole or '')."""

    batch: Batch | PairBatch | RegionBatch
    samples: list[tuple[str, str]]


class Assembler:
    """`begin` asks the pool for all media of a pack, `finish` waits for them and builds the batch."""

    def __init__(self, plan: PackPlan, pool: DecodePool):
        self.plan, self.pool = plan, pool
        self.processor, self.tokenizer = plan.processor, plan.tokenizer

    def begin(self, pack: int) -> list[Pending]:
        return [self._begin(draw) for draw in self.plan.pack(pack)]

    def _begin(self, draw: Draw) -> Pending:
        sample, source = self.plan.sample(draw), self.plan.mix.sources[draw.source]
        parts = media_parts(sample["messages"]) if self.plan.kind in CONVERSATIONS else [first_media(sample)]
        pending = Pending(draw, self.plan.mix.name(draw), sample, {}, {})
        for part in parts:
            suffix = suffix_of(part)
            if suffix not in pending.frames:
                shape = frames_shape(part, sample, self.processor)
                pending.shapes[suffix] = shape
                if self.plan.kind == "told":
                    pending.frames[suffix] = Future()
                    settle(pending.frames[suffix], partial(self._told, part, sample, shape))
                else:
                    job = Job(source.locate(draw.sample, suffix), part["type"], shape)
                    pending.frames[suffix] = self.pool.submit(job)
        return pending

    def finish(self, pack: list[Pending]) -> Made:
        make = {"packs": self._packs, "told": self._packs, "pairs": self._pairs, "regions": self._regions}
        return make[self.plan.kind](pack)

    def _told(self, part: dict[str, Any], sample: dict[str, Any], shape: tuple[int, int, int]) -> np.ndarray:
        """All frames of a picture or clip in their order of time: which are shown is `prepare`'s to say."""
        suffix = suffix_of(part)
        plan = video_plan(sample["media"][suffix], self.processor) if part["type"] == "video" else None
        return told_frames(sample["told"][suffix], shape, plan, self.processor, self.tokenizer)

    def _packs(self, pack: list[Pending]) -> Made:
        examples, samples = [], []
        for p in pack:
            frames, reason = self._frames(p)
            example = self._example(p, frames)
            if reason:
                example = dataclasses.replace(example, loss_mask=torch.zeros_like(example.loss_mask))
            examples.append(example)
            samples.append((p.name, reason))
        return Made(join(examples, [p.name for p in pack]), samples)

    def _frames(self, p: Pending) -> tuple[dict[str, np.ndarray], str]:
        """Every member's frames; all grey, and the reason, where one of them is bad."""
        try:
            return {suffix: future.result() for suffix, future in p.frames.items()}, ""
        except BadSample as e:
            return {s: np.full((*shape, 3), GREY, np.uint8) for s, shape in p.shapes.items()}, e.reason

    def _example(self, p: Pending, frames: dict[str, np.ndarray]) -> Example:
        def load(part: dict[str, Any]) -> tuple[np.ndarray, VideoPlan | None]:
            suffix = suffix_of(part)
            if part["type"] == "image":
                return frames[suffix], None
            return frames[suffix], video_plan(p.sample["media"][suffix], self.processor)

        return prepare(p.sample["messages"], self.processor, self.tokenizer, load)

    def _pairs(self, pack: list[Pending]) -> Made:
        kept, clips, samples = self._kept(pack)
        texts = [pair_ids(p.sample, self.tokenizer, self.plan.max_text) for p in kept]
        return Made(PairBatch(**_joined(texts), **self._patches(clips), draws=[p.name for p in kept]), samples)

    def _regions(self, pack: list[Pending]) -> Made:
        kept, pictures, samples = self._kept(pack)
        texts, regions = [], []
        for row, (p, frames) in enumerate(zip(kept, pictures, strict=True)):
            _, height, width = self.processor.frames_grid(frames)
            plan = shown(first_media(p.sample), p.sample, self.processor)
            for region in named_regions(p.sample):
                ids = phrase_ids(region.phrase, self.tokenizer, self.plan.max_text)
                for frame in region.frames(plan):
                    texts.append(ids)
                    regions.append((row, frame, *in_patches(region.box, height, width)))
        names = self.plan.names
        batch = RegionBatch(
            **_joined(texts), **self._patches(pictures), draws=[p.name for p in kept],
            regions=torch.tensor(regions, dtype=torch.int64), words=torch.from_numpy(names.words),
            rivals=torch.from_numpy(np.concatenate([names.rivals(ids) for ids in texts])),
        )  # fmt: skip
        return Made(batch, samples)

    def _kept(self, pack: list[Pending]) -> tuple[list[Pending], list[np.ndarray], list[tuple[str, str]]]:
        """What is left of a pack without those that failed (there is nothing in them to be masked), their frames,
        and `Made.samples`; if all failed, one grey picture keeps the shape legal."""
        loaded = [(p, *self._frames(p)) for p in pack]
        kept = [(p, f) for p, f, reason in loaded if not reason] or [loaded[0][:2]]
        clips = [self._in_order(p, next(iter(frames.values()))) for p, frames in kept]
        return [p for p, _ in kept], clips, [(p.name, reason) for p, _, reason in loaded]

    def _patches(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.cat([torch.from_numpy(self.processor.patchify(c)) for c in clips]),
            "grid_thw": torch.tensor([self.processor.frames_grid(c) for c in clips], dtype=torch.int64),
        }

    @staticmethod
    def _in_order(p: Pending, frames: np.ndarray) -> np.ndarray:
        order = first_media(p.sample).get("frames")
        return frames if order is None else frames[order]


def told_frames(
    told: str, shape: tuple[int, int, int], plan: VideoPlan | None, processor: Processor, tokenizer: Tokenizer
) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of this shape [T, H, W] that spell what is told of a picture or clip (`mm.told`), in
    boxes with names. Raises BadSample."""
    height, width = shape[1] // processor.patch_size, shape[2] // processor.patch_size
    places = [
        ((frame, *in_patches(region.box, height, width)), said(region.phrase, tokenizer))
        for region in regions_of(told) for frame in region.frames(plan)
    ]
    return spell(shape, places, processor.patch_size)


def _joined(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([i for t in texts for i in t], dtype=torch.int64),
        "cu_seqlens": torch.tensor(np.cumsum([0, *map(len, texts)]), dtype=torch.int32),
    }
