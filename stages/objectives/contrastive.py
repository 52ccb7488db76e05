"""SigLIP's sigmoid loss over every image-text pair of a step, however the step is split.

Every image is set against every text of the step, also those on other ranks and in other micro-batches.
So that memory stays that of one micro-batch, the embeddings are made twice (gradient caching, Gao et al.
2021, arXiv 2101.06983): once without gradients to get the loss and its gradient at each embedding, once with,
to carry that gradient into the weights. A single micro-batch on each rank needs one pass only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mm.batch import PairBatch
from mm.common import dist
from stages.engine import flops
from stages.objectives.objective import Objective, Terms, device_of, grids, most
from stages.stage import Budget

Pair = tuple[torch.Tensor, torch.Tensor]


class Contrastive(Objective):
    """Zhai et al. 2023 (arXiv 2303.15343): sum over all pairs of -log sigmoid(+-logit) / number of images.

    The model offers `image_embeds(pixel_values, grid_thw)`, `text_embeds(input_ids, cu_seqlens)` (unit norm,
    [M, D]) and the parameters `logit_scale`, `logit_bias`.
    """

    kind = "pairs"

    def counts(self, batches: Sequence[PairBatch]) -> dict[str, float]:
        return {"contrastive": float(sum(b.grid_thw.shape[0] for b in batches))}

    def accumulate(
        self, model: Any, batches: Sequence[PairBatch], denominators: dict[str, float],
        phase: str = "main",
    ) -> Terms:  # fmt: skip
        device = device_of(model)
        weight = 1.0 / max(denominators["contrastive"], 1e-9)
        rounds = most(batches, device)
        if rounds == 1 and dist.world_size() == 1:
            image, text = _embed(model, batches[0])
            loss = pair_loss(image, text, 0, *_scale_and_bias(model))
            (loss * weight).backward()
            return {"contrastive": (loss.detach(), float(len(image)))}
        padded = [batches[i] if i < len(batches) else self.blank(model).to(device) for i in range(rounds)]
        return {"contrastive": _cached(model, padded, len(batches), weight)}

    def flops(self, model: Any, batches: Sequence[PairBatch]) -> float:
        return sum(flops.of_pairs(model, b).training for b in batches)

    def measure(self, batches: Sequence[PairBatch]) -> dict[str, float]:
        patches = sum(b.pixel_values.shape[0] for b in batches)
        texts = sum(b.input_ids.numel() for b in batches)
        return {**super().measure(batches), "tokens": texts + patches // 4, "patches": patches}

    def blank(self, model: Any) -> PairBatch:
        """One pair whose embeddings are thrown away: what a rank with nothing left runs."""
        return _pairs(model, torch.tensor([[1, 2, 2]]), length=1)

    def shaped(self, model: Any, budget: Budget, pieces: int = 1) -> PairBatch:
        return _pairs(model, grids(max(budget.visual_tokens, pieces), pieces), length=max(budget.tokens // pieces, 1))


def pair_loss(
    image: torch.Tensor, text: torch.Tensor, offset: int, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Sum over rows x columns of -log sigmoid(z * logit), fp32; image i goes with text offset + i.

    Shapes: image [m, D], text [n, D], scale (a logarithm) and bias of one element.
    """
    logits = (image.float() @ text.float().T) * scale.float().exp() + bias.float()  # [m, n]
    sign = torch.full_like(logits, -1.0)
    rows = torch.arange(len(image), device=image.device)
    sign[rows, rows + offset] = 1.0
    return -F.logsigmoid(sign * logits).sum()


def _embed(model: Any, batch: PairBatch) -> Pair:
    image = model.image_embeds(batch.pixel_values, batch.grid_thw)
    return image, model.text_embeds(batch.input_ids, batch.cu_seqlens)


def _scale_and_bias(model: Any) -> Pair:
    """Called right after a forward: a sharded model's root keeps its parameters whole until the backward."""
    return model.logit_scale, model.logit_bias


def _cached(model: Any, batches: list[PairBatch], real: int, weight: float) -> tuple[torch.Tensor, float]:
    """Two passes over the micro-batches, of which the first `real` count. Returns this rank's (sum, count).

    A single micro-batch keeps the graph of its first pass and needs no second.
    """
    single = len(batches) == 1
    with torch.set_grad_enabled(single):
        pairs = [_embed(model, b) for b in batches]
    empty = [tuple(x[:0] for x in pairs[0])] if real == 0 else []
    image, text = (torch.cat(x).detach().float() for x in zip(*(empty or pairs[:real]), strict=True))
    scale, bias = (p.detach().clone() for p in _scale_and_bias(model))
    loss, d_image, d_text, d_scale, d_bias = _gradients(image, text, scale, bias)
    start = 0
    for i, batch in enumerate(batches):
        x, y = pairs[0] if single else _embed(model, batch)
        n = len(x) if i < real else 0
        part = (x.float()[:n] * d_image[start : start + n]).sum()
        part = part + (y.float()[:n] * d_text[start : start + n]).sum() + 0.0 * (x.sum() + y.sum()).float()
        s, b = _scale_and_bias(model)
        once = 1.0 if i == 0 else 0.0
        (weight * (part + once * ((s * d_scale).sum() + (b * d_bias).sum()))).backward()
        start += n
    return loss, float(len(image))


def _gradients(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor):
    """This rank's rows of the loss, and the gradients of the whole loss at this rank's embeddings.

    Each rank sets its own images against all texts; the texts' gradients are then added up over ranks.
    """
    sizes = dist.gather_objects(len(text))
    first = sum(sizes[: dist.rank()])
    leaves = [image, _gather(text, sizes), scale, bias]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in leaves]
        loss = pair_loss(leaves[0], leaves[1], first, leaves[2], leaves[3])
        grads = torch.autograd.grad(loss, leaves)
    d_text = dist.sum_tensor(grads[1].contiguous())[first : first + len(text)]
    return loss.detach(), grads[0], d_text, grads[2], grads[3]


def _gather(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """[m, D] on each rank -> [sum(sizes), D] on every rank, in rank order; the m may differ."""
    if not dist.on():
        return x
    padded = F.pad(x, (0, 0, 0, max(sizes) - len(x))).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)])


def _pairs(model: Any, grid: torch.Tensor, *, length: int) -> PairBatch:
    patch, pieces = model.vision_model.config.patch_size, len(grid)
    length = min(length, model.text_model.config.max_positions)
    return PairBatch(
        input_ids=torch.zeros(pieces * length, dtype=torch.int64),
        cu_seqlens=(torch.arange(pieces + 1) * length).to(torch.int32),
        pixel_values=torch.zeros(int(grid.prod(1).sum()), 3 * patch * patch, dtype=torch.uint8), grid_thw=grid,
    )  # fmt: skip
