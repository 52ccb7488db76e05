"""Model FLOPs, counted from shapes: the tower, the projector and the decoder with their attention.

A multiplication with its addition is 2 FLOPs. Attention is counted over each whole segment, without a discount
for the causal half (as Chowdhery et al. 2022, appendix B, and torch's own counter do). Recomputation under
activation checkpointing and second passes are no model FLOPs. Norms, rotations and softmax are left out.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm.batch import Batch, PairBatch, RegionBatch


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by module, and those of a training step (forward, and what of the backward is needed)."""

    forward: dict[str, float]
    training: float


@dataclass(frozen=True)
class _Part:
    """Matrix products with weights, and attention's products of activations, of one module's forward.
    first: products with weights whose input is data and needs no gradient."""

    weights: float
    attention: float = 0.0
    first: float = 0.0


def block_weights(c: Any) -> float:
    """Parameters that multiply each patch or token in one block of a SigLIP tower (image or text)."""
    return 4.0 * c.hidden_size**2 + 2.0 * c.hidden_size * c.intermediate_size


def _tower(c: Any, grids: Sequence[Sequence[int]]) -> _Part:
    patches = sum(t * h * w for t, h, w in grids)
    segments = [(t * h * w) ** 2 if c.segments == "clip" else t * (h * w) ** 2 for t, h, w in grids]
    return _Part(
        2.0 * patches * c.num_hidden_layers * block_weights(c),
        4.0 * sum(segments) * c.hidden_size * c.num_hidden_layers,
        2.0 * patches * c.num_channels * c.patch_size**2 * c.hidden_size,
    )


def _projector(c: Any, grids: Sequence[Sequence[int]]) -> _Part:
    merged = sum(t * h * w for t, h, w in grids) // 4
    wide = 4 * c.vision.hidden_size
    return _Part(2.0 * merged * (wide * wide + wide * c.decoder.hidden_size))


def _decoder(c: Any, segments: Iterable[int]) -> _Part:
    segments = list(segments)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    per_token = 2 * c.hidden_size * q + 2 * c.hidden_size * kv + 3 * c.hidden_size * c.intermediate_size
    return _Part(
        2.0 * sum(segments) * per_token * c.num_hidden_layers,
        4.0 * sum(n * n for n in segments) * q * c.num_hidden_layers,
    )


def _text_tower(c: Any, segments: Sequence[int]) -> _Part:
    return _Part(
        2.0 * (sum(segments) * c.num_hidden_layers * block_weights(c)
               + len(segments) * c.hidden_size * c.projection_size),
        4.0 * sum(n * n for n in segments) * c.hidden_size * c.num_hidden_layers,
    )  # fmt: skip


def _pool_head(c: Any, grids: Sequence[Sequence[int]]) -> _Part:
    """One learned probe attends to all patches of a picture, then an MLP."""
    images, patches, d = len(grids), sum(t * h * w for t, h, w in grids), c.hidden_size
    return _Part(2.0 * (2 * patches * d * d + images * (2 * d * d + 2 * d * c.intermediate_size)), 4.0 * patches * d)


def of_keye(
    config: Any, segments: Sequence[int], grids: Sequence[Sequence[int]], targets: int, trains: dict[str, float]
) -> Flops:
    """FLOPs of one pack: segment lengths, grids (t, h, w in patches), trained tokens; `trains`: module ->
    share of its weights that train, for tower, projector, embedding, decoder, head."""
    parts = {
        "tower": _tower(config.vision, grids),
        "projector": _projector(config, grids),
        "decoder": _decoder(config.decoder, segments),
        "head": _Part(2.0 * targets * config.decoder.hidden_size * config.decoder.vocab_size),
    }
    into = {"decoder": ("tower", "projector", "embedding"), "projector": ("tower",)}
    into["head"] = (*into["decoder"], "decoder")
    return _total(parts, into, trains)


def of_contrastive(
    vision: Any, text: Any, segments: Sequence[int], grids: Sequence[Sequence[int]], trains: dict[str, float]
) -> Flops:
    parts = {
        "tower": _tower(vision, grids), "pool": _pool_head(vision, grids), "text": _text_tower(text, segments),
    }  # fmt: skip
    return _total(parts, {"pool": ("tower",)}, trains)


def _total(parts: dict[str, _Part], into: dict[str, tuple[str, ...]], trains: dict[str, float]) -> Flops:
    """A product W x costs as much again for the gradient at x (wanted when anything below or beside trains)
    and again for the gradient at W (for the share of W that trains); attention's products cost double."""
    training = 0.0
    for name, part in parts.items():
        own = trains.get(name, 0.0)
        passes = own > 0 or any(trains.get(x, 0.0) > 0 for x in into.get(name, ()))
        training += part.weights * (1 + passes + own) + part.attention * (1 + 2 * passes)
        training += part.first * (1 + own)
    return Flops({k: v.weights + v.attention + v.first for k, v in parts.items()}, training)


PREFIXES = {
    "visual.": "tower", "mlp_AR.": "projector", "model.embed_tokens.": "embedding", "model.": "decoder",
    "lm_head.": "head", "logit_": "temperature", "vision_model.head.": "pool", "vision_model.": "tower",
    "text_model.": "text",
}  # fmt: skip


def module_of(name: str) -> str:
    """Which part of the model a parameter belongs to, by the first prefix that fits."""
    return next((part for prefix, part in PREFIXES.items() if name.startswith(prefix)), "other")


_shares: weakref.WeakKeyDictionary[nn.Module, dict[str, float]] = weakref.WeakKeyDictionary()


def trained_shares(model: nn.Module) -> dict[str, float]:
    """Module -> share of its weights that train; kept per model, so freeze before the first call."""
    if model not in _shares:
        total: dict[str, float] = {}
        trained: dict[str, float] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.ndim > 1:
                part = module_of(name)
                total[part] = total.get(part, 0) + p.numel()
                trained[part] = trained.get(part, 0) + p.numel() * p.requires_grad
        _shares[model] = {k: trained[k] / total[k] for k in total}
    return _shares[model]


def of_batch(model: Any, batch: Batch) -> Flops:
    """FLOPs of one pack for a `mm.keye.Keye`."""
    targets = int(batch.target_mask().sum())
    return of_keye(model.config, _lengths(batch.cu_seqlens), batch.grid_thw.tolist(), targets, trained_shares(model))


def of_pairs(model: Any, batch: PairBatch) -> Flops:
    """FLOPs of one micro-batch for a `vision.text_tower.ContrastiveModel`."""
    vision, text = model.vision_model.config, model.text_model.config
    return of_contrastive(vision, text, _lengths(batch.cu_seqlens), batch.grid_thw.tolist(), trained_shares(model))


def of_regions(model: Any, batch: RegionBatch) -> Flops:
    """The same model where patches are asked for words and places: tower, a head over all patches, and each patch
    with every place of its frame."""
    vision, asked = model.vision_model.config, len(batch.pixel_values)
    pairs = sum(t * (h * w) ** 2 for t, h, w in batch.grid_thw.tolist())
    parts = {"tower": _tower(vision, batch.grid_thw.tolist()),
             "text": _Part(2.0 * asked * vision.hidden_size * len(batch.words)),
             "places": _Part(0.0, 2.0 * pairs * vision.hidden_size)}  # fmt: skip
    return _total(parts, {"text": ("tower",), "places": ("tower",)}, {**trained_shares(model), "text": 1.0})


def of_aligned(model: Any, batch: RegionBatch) -> Flops:
    """A `mm.told.Aligned`: tower and projector alone."""
    grids = batch.grid_thw.tolist()
    parts = {"tower": _tower(model.config.vision, grids), "projector": _projector(model.config, grids)}
    return _total(parts, {"projector": ("tower",)}, trained_shares(model))


def _lengths(cu_seqlens: torch.Tensor) -> list[int]:
    return (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
