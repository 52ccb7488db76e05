"""The one road from messages to tensors, for training, evaluation and chat alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm.batch import Batch
from mm.common.errors import BadSample, UserError
from mm.positions import position_ids
from mm.processor import Grid, Processor, VideoPlan
from mm.template import Message, Part, encode, media_parts, token_count
from mm.tokenizer import Tokenizer
from vision.media import VideoInfo

# part -> (frames uint8 [T, h, w, 3] as the processor resizes them, the plan of a clip or None for a picture)
Load = Callable[[Part], tuple[np.ndarray, VideoPlan | None]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation ready for the model.

    input_ids int64 [L]; loss_mask bool [L]; position_ids int64 [3, L]; pixel_values uint8 [N, 3 * patch * patch];
    grid_thw int64 [M, 3] in patches, one row per picture or whole clip; `turns`: messages kept.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    turns: int

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def prepare(
    messages: Sequence[Message], processor: Processor, tokenizer: Tokenizer, load: Load, *,
    generate: bool = False, max_tokens: int | None = None,
) -> Example:  # fmt: skip
    """Load every picture and clip, encode the text, place everything in time and space.

    `load` gives a clip's frames as its plan says; a part's "frames" order is applied here, so that a cache of
    decoded frames serves every order. Positions follow the order shown.
    Raises BadSample (also from `load`); UserError where `load` returns something else than agreed.
    """
    loaded = [_shown(part, *load(part)) for part in media_parts(messages)]
    grids = [processor.frames_grid(frames) for frames, _ in loaded]
    encoded = encode(
        messages, tokenizer, [processor.tokens(g) for g in grids], generate=generate, max_tokens=max_tokens
    )
    kept = len(encoded.spans)
    positions = position_ids(
        len(encoded.input_ids), [(s.start, s.count) for s in encoded.spans], grids[:kept],
        [seconds for _, seconds in loaded[:kept]],
        merge_size=processor.merge_size, tokens_per_second=processor.tokens_per_second,
    )  # fmt: skip
    patches = [torch.from_numpy(processor.patchify(frames)) for frames, _ in loaded[:kept]]
    return Example(
        input_ids=encoded.input_ids, loss_mask=encoded.loss_mask, position_ids=positions,
        pixel_values=torch.cat(patches) if patches else torch.zeros(0, processor.patch_dim, dtype=torch.uint8),
        grid_thw=torch.tensor(grids[:kept], dtype=torch.int64).reshape(-1, 3), turns=encoded.turns,
    )  # fmt: skip


def _shown(part: Part, frames: np.ndarray, plan: VideoPlan | None) -> tuple[np.ndarray, float]:
    """The frames in the order shown, and the seconds from one to the next (0 for a picture)."""
    if (plan is not None) != (part["type"] == "video"):
        raise UserError(f"load() gave {'no' if plan is None else 'a'} video plan for a part of type {part['type']!r}")
    if plan is None:
        return frames, 0.0
    if len(frames) != plan.grid[0]:
        raise UserError(f"load() gave {len(frames)} frames where the plan says {plan.grid[0]}")
    order = part.get("frames")
    if order is not None:
        plan, frames = plan.reordered(order), frames[order]
    return frames, plan.seconds_per_frame


def join(examples: Sequence[Example], draws: Sequence[str] = ()) -> Batch:
    """Examples end to end in one row, each a segment of its own. Raises UserError where there is none."""
    if not examples:
        raise UserError("join: no examples")
    lengths = torch.tensor([0, *(len(e) for e in examples)])
    return Batch(
        input_ids=torch.cat([e.input_ids for e in examples]),
        loss_mask=torch.cat([e.loss_mask for e in examples]),
        position_ids=torch.cat([e.position_ids for e in examples], dim=1),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        pixel_values=torch.cat([e.pixel_values for e in examples]),
        grid_thw=torch.cat([e.grid_thw for e in examples]),
        draws=list(draws),
    )


# ---- from metadata alone


def media_grids(messages: Sequence[Message], facts: Mapping[str, Any], processor: Processor) -> list[Grid]:
    """The (t, h, w) patch grid of every picture and clip, exactly as decoding will yield it.

    `facts`: what a sample says of its media: member name -> {"kind", "width", "height", and for a clip "frames",
    "fps", "seconds", "rotation", "audio"}. Raises BadSample.
    """
    return [_grid(part, _facts_of(part, facts), processor) for part in media_parts(messages)]


def media_tokens(messages: Sequence[Message], facts: Mapping[str, Any], processor: Processor) -> list[int]:
    """Tokens of every picture and clip in order, from metadata alone. Raises BadSample."""
    return [processor.tokens(grid) for grid in media_grids(messages, facts, processor)]


def sample_tokens(sample: Mapping[str, Any], processor: Processor, tokenizer: Tokenizer) -> tuple[int, int]:
    """(all tokens, visual tokens) of a stored sample, from metadata alone. Raises BadSample."""
    if not isinstance(sample.get("messages"), list):
        raise BadSample("no messages")
    visual = media_tokens(sample["messages"], sample.get("media") or {}, processor)
    return token_count(sample["messages"], tokenizer, visual), sum(visual)


def _facts_of(part: Part, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    name = part[part["type"]]
    found = facts.get(name) if isinstance(name, str) else None
    if not isinstance(found, Mapping):
        raise BadSample(f"media {name!r} is not in the sample")
    if found.get("kind") != part["type"]:
        raise BadSample(f"media {name!r} is not of kind {part['type']!r}")
    return found


def _grid(part: Part, facts: Mapping[str, Any], processor: Processor) -> Grid:
    try:
        if part["type"] == "image":
            return processor.image_grid(facts["width"], facts["height"])
        info = VideoInfo(**{f.name: facts[f.name] for f in fields(VideoInfo)})
        plan = processor.video_plan(info)
    except KeyError as e:
        raise BadSample(f"media facts lack {e.args[0]!r}") from e
    except (TypeError, OverflowError) as e:
        raise BadSample("media facts are not numbers") from e
    order = part.get("frames")
    return (plan if order is None else plan.reordered(order)).grid


# ---- from files


def file_loader(root: str | Path, processor: Processor) -> Load:
    """A `load` that reads each part's file below folder `root`. A path that leads out of it is a BadSample."""
    base = Path(root).resolve()

    def load(part: Part) -> tuple[np.ndarray, VideoPlan | None]:
        path = (base / str(part[part["type"]])).resolve()
        if not path.is_relative_to(base):
            raise BadSample("media path leads out of its folder")
        if part["type"] == "video":
            return processor.load_video(path)
        return processor.load_image(path), None

    return load
