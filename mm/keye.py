"""Keye-VL (arXiv 2507.01949): vision tower, 2x2 merging projector, Qwen3 decoder, over one packed row.

Shape legend: L tokens, N patches, M pictures or clips, n = N / 4 visual tokens, D hidden of the decoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mm.batch import Batch
from mm.common.errors import UserError
from mm.decoder import Decoder, DecoderConfig
from mm.tokenizer import Tokenizer
from vision.init import siglip, stream
from vision.vit import VisionConfig, VisionTower, normalise


@dataclass(frozen=True, kw_only=True)
class KeyeConfig:
    """projector_norm: "pre" normalises each patch before the merge (Preview), "post" the four together (1.5)."""

    decoder: DecoderConfig
    vision: VisionConfig
    projector_norm: str = "pre"
    image_token_id: int = 151655
    video_token_id: int = 151656
    merge_size: int = 2

    def __post_init__(self) -> None:
        if self.projector_norm not in ("pre", "post"):
            raise UserError(f"projector_norm={self.projector_norm!r} is not known; use pre or post")

    def bound(self, tokenizer: Tokenizer) -> "KeyeConfig":
        """A copy that takes its placeholder ids from `tokenizer`; a table too small for it is a UserError."""
        if tokenizer.vocab_size > self.decoder.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} entries, the model's table {self.decoder.vocab_size}: "
                "train a smaller tokenizer or set decoder.vocab_size"
            )
        image, video = (tokenizer.id(f"<|{kind}_pad|>") for kind in ("image", "video"))
        return replace(self, image_token_id=image, video_token_id=video)


def merge_order(grid_thw: torch.Tensor, merge: int) -> torch.Tensor:
    """int64 [N]: source patch of each place once the patches of a block lie together (row, column in block)."""
    sizes = grid_thw.prod(1)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    h, w = (grid_thw[:, i].repeat_interleave(sizes) for i in (1, 2))
    place = torch.arange(len(starts), device=grid_thw.device) - starts
    frame, within = place // (h * w), place % (h * w)
    block, inside = within // merge**2, within % merge**2
    row = block // (w // merge) * merge + inside // merge
    column = block % (w // merge) * merge + inside % merge
    return starts + frame * h * w + row * w + column


class Projector(nn.Module):
    """Concatenate each 2x2 block of patches, then Linear, GELU, Linear into the decoder's space."""

    def __init__(self, config: KeyeConfig):
        super().__init__()
        self.merge, self.norm_first = config.merge_size, config.projector_norm == "pre"
        narrow = config.vision.hidden_size
        wide = narrow * config.merge_size**2
        self.pre_norm = nn.LayerNorm(narrow if self.norm_first else wide, eps=1e-5)
        self.linear_1 = nn.Linear(wide, wide)
        self.linear_2 = nn.Linear(wide, config.decoder.hidden_size)

    def forward(self, x: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """[N, vision hidden] -> [n, D]."""
        if self.norm_first:
            x = self.pre_norm(x)
        x = x[merge_order(grid_thw, self.merge)].view(-1, self.linear_1.in_features)
        if not self.norm_first:
            x = self.pre_norm(x)
        return self.linear_2(F.gelu(self.linear_1(x)))


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk: int = 1024
) -> torch.Tensor:
    """log p(target) of each row, fp32 [n], never holding more than `chunk` rows of logits.

    Args: hidden [n, D], weight [V, D] of the head, targets int64 [n]. Logits are recomputed in backward.
    """

    def piece(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(F.linear(h, w).float(), t, reduction="none")

    # At least one piece, even of no rows, so that the head has a gradient on every rank.
    return torch.cat([
        checkpoint(piece, hidden[i : i + chunk], weight, targets[i : i + chunk], use_reentrant=False)
        for i in range(0, max(len(targets), 1), chunk)
    ])  # fmt: skip


class Keye(nn.Module):
    """Parameter names are those of the published checkpoints: visual.vision_model, mlp_AR, model, lm_head."""

    def __init__(self, config: KeyeConfig):
        super().__init__()
        self.config = config
        self.visual = nn.ModuleDict({"vision_model": VisionTower(config.vision)})
        self.mlp_AR = Projector(config)
        self.model = Decoder(config.decoder)
        if not config.decoder.tie_word_embeddings:
            self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]: what turns hidden states into logits."""
        tied = self.config.decoder.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> fp32 [..., V]."""
        return F.linear(hidden, self.head_weight).float()

    def visual_features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3 * patch * patch], int64 [M, 3] -> [n, D], ready to stand in for placeholder tokens."""
        pixels = normalise(pixel_values, self.mlp_AR.linear_1.weight.dtype)
        return self.mlp_AR(self.visual["vision_model"](pixels, grid_thw), grid_thw)

    def embed(self, batch: Batch) -> torch.Tensor:
        """[L, D]: token embeddings with visual features at the placeholders, in order.

        Raises: UserError before anything is computed where placeholders, grids and patches disagree.
        """
        holes = (batch.input_ids == self.config.image_token_id) | (batch.input_ids == self.config.video_token_id)
        self._check(batch, int(holes.sum()))
        x = self.model.embed_tokens(batch.input_ids)
        if len(batch.grid_thw):
            features = self.visual_features(batch.pixel_values, batch.grid_thw)
            return x.masked_scatter(holes[:, None], features.to(x.dtype))
        # A rank without pictures runs the tower all the same: its collectives match the other ranks',
        # and every parameter has a gradient (of zero).
        merge, patch = self.config.merge_size, self.config.vision.patch_size
        grey = torch.full(
            (merge**2, self.config.vision.num_channels * patch**2), 127, dtype=torch.uint8, device=x.device
        )
        return x + 0.0 * self.visual_features(grey, torch.tensor([[1, merge, merge]], device=x.device)).sum()

    def _check(self, batch: Batch, placeholders: int) -> None:
        merge, grids = self.config.merge_size, batch.grid_thw.tolist()
        patches = sum(t * h * w for t, h, w in grids)
        who = ", ".join(batch.draws[:8]) + (" ..." if len(batch.draws) > 8 else "")
        of = f" (pack of {who})" if who else ""
        odd = [g for g in grids if g[1] % merge or g[2] % merge or min(g) < 1]
        if odd:
            raise UserError(f"grid {odd[0]} is not made of whole {merge}x{merge} blocks of patches{of}")
        if patches != len(batch.pixel_values):
            raise UserError(f"{len(batch.pixel_values)} patches given, the grids speak of {patches}{of}")
        if placeholders != patches // merge**2:
            raise UserError(
                f"{placeholders} placeholder tokens but {patches // merge**2} visual features{of}; "
                "tokens and media must come from the same processor"
            )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [L, D] after the decoder's final norm."""
        return self.model(self.embed(batch), batch.position_ids, batch.cu_seqlens)

    def logprobs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(fp32 [n], int64 [n]): log-probability of each trained token, and the row it lies at."""
        rows = batch.target_mask().nonzero()[:, 0]
        hidden = Keye.forward(self, batch)[rows]
        return token_logprobs(hidden, self.head_weight, batch.input_ids[rows + 1]), rows + 1

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(fp32 sum of cross entropy over the trained tokens, their number). The head runs on their rows alone."""
        logprobs, rows = self.logprobs(batch)
        return -logprobs.sum(), len(rows)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights that depend on `seed` and each parameter's name only, on any device."""
        for name, value in self.initial_weights(seed):
            self.get_parameter(name).copy_(value)

    def initial_weights(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 CPU tensor) of every parameter, one at a time: for whoever fills sharded parameters."""
        for name, p in self.named_parameters():
            ours = name.startswith(("model.", "lm_head."))
            value = self._decoder_start(name, p.shape, seed) if ours else siglip(name, p.shape, seed)
            if name == "mlp_AR.linear_2.weight":  # so that pictures begin no louder than words
                value *= self.config.decoder.initializer_range
            yield name, value

    def _decoder_start(self, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
        """N(0, initializer_range); the matrices that write to the residual stream smaller by sqrt(2 * layers)."""
        if "norm" in name:
            return torch.ones(shape)
        std, depth = self.config.decoder.initializer_range, 2 * self.config.decoder.num_hidden_layers
        std /= depth**0.5 if "o_proj" in name or "down_proj" in name else 1.0
        return torch.empty(shape).normal_(0.0, std, generator=stream(seed, name))
