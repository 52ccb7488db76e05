"""A very small Keye, and packed rows for it."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch

from mm.batch import Batch
from mm.decoder import DecoderConfig
from mm.keye import Keye, KeyeConfig
from mm.positions import position_ids
from vision.vit import VisionConfig

IMAGE, VIDEO = 90, 91


@pytest.fixture(scope="session")
def keye_config() -> KeyeConfig:
    return KeyeConfig(
        vision=VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
            image_size=16,
        ),
        decoder=DecoderConfig(
            vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, mrope_section=(2, 3, 3), rope_theta=1e4,
            initializer_range=0.2,
        ),
        image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip


@pytest.fixture()
def make_keye(keye_config):
    """make_keye(seed=0, **decoder numbers, vision={...}) -> a fresh Keye whose biases and norms are random too."""

    def make(seed: int = 0, *, vision: dict | None = None, config: KeyeConfig = keye_config, **decoder) -> Keye:
        config = dataclasses.replace(
            config, decoder=dataclasses.replace(config.decoder, **decoder),
            vision=dataclasses.replace(config.vision, **(vision or {})),
        )  # fmt: skip
        model = Keye(config)
        model.init_weights(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.05)
        return model

    return make


@pytest.fixture(scope="session")
def make_batch():
    """make_batch([segment, ...], seed) where a segment is a list of text lengths and (t, h, w) grids in order."""

    def make(segments: Sequence[Sequence], seed: int = 0) -> Batch:
        g = torch.Generator().manual_seed(seed)
        singles = [_segment(parts, g) for parts in segments]
        lengths = torch.tensor([0, *(len(s.input_ids) for s in singles)])
        return Batch(
            input_ids=torch.cat([s.input_ids for s in singles]), loss_mask=torch.cat([s.loss_mask for s in singles]),
            position_ids=torch.cat([s.position_ids for s in singles], 1),
            cu_seqlens=lengths.cumsum(0).to(torch.int32),
            pixel_values=torch.cat([s.pixel_values for s in singles]),
            grid_thw=torch.cat([s.grid_thw for s in singles]),
            draws=[f"test/0/{i}#0" for i in range(len(singles))],
        )  # fmt: skip

    return make


def _segment(parts: Sequence, g: torch.Generator) -> Batch:
    ids, mask, spans, grids = [], [], [], []
    for part in parts:
        start = sum(len(i) for i in ids)
        if isinstance(part, int):
            ids.append(torch.randint(0, 90, (part,), generator=g))
            mask.append(torch.rand(part, generator=g) < 0.6)
        else:
            t, h, w = part
            count = t * h * w // 4
            ids.append(torch.full((count,), IMAGE if t == 1 else VIDEO))
            mask.append(torch.zeros(count, dtype=torch.bool))
            spans.append((start, count))
            grids.append(part)
    length = sum(len(i) for i in ids)
    patches = sum(t * h * w for t, h, w in grids)
    return Batch(
        input_ids=torch.cat(ids), loss_mask=torch.cat(mask),
        position_ids=position_ids(length, spans, grids, [0.7] * len(grids)),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        pixel_values=torch.randint(0, 256, (patches, 48), dtype=torch.uint8, generator=g),
        grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
    )  # fmt: skip


def cut(batch: Batch) -> list[Batch]:
    """The segments of a pack as packs of their own."""
    out, rows = [], 0
    cu = batch.cu_seqlens.tolist()
    for i, (a, b) in enumerate(itertools.pairwise(cu)):
        need = int(((batch.input_ids[a:b] == IMAGE) | (batch.input_ids[a:b] == VIDEO)).sum()) * 4
        grids, patches = [], int(batch.grid_thw[:rows].prod(1).sum())
        while sum(int(g.prod()) for g in grids) < need:
            grids.append(batch.grid_thw[rows])
            rows += 1
        out.append(Batch(
            input_ids=batch.input_ids[a:b], loss_mask=batch.loss_mask[a:b], position_ids=batch.position_ids[:, a:b],
            cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
            pixel_values=batch.pixel_values[patches : patches + need],
            grid_thw=torch.stack(grids) if grids else batch.grid_thw[:0], draws=batch.draws[i : i + 1],
        ))  # fmt: skip
    return out


@pytest.fixture(scope="session")
def unpack():
    return cut


# Text alone, pictures of several sizes, a clip, both in one conversation; equal lengths side by side too.
MIXED = [[11], [3, (1, 4, 6), 9], [7, (3, 4, 4), 6], [2, (1, 2, 2), 3, (2, 6, 4), 5, (1, 4, 4), 8], [11], [11]]


@pytest.fixture(scope="session")
def mixed():
    return MIXED
