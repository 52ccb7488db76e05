"""The vision tower: SigLIP's transformer at native resolution over a packed row of patches.

Keye-VL report (arXiv 2507.01949, section 2.1): the learned position table is interpolated to each
picture's grid, and 2D rotary embedding on queries and keys tells rows from columns.

Shape legend: N patches of all pictures, M pictures or clips, D hidden, H heads, d = D / H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mm.common.attention import Segments, inverse_frequencies, resolve, rotate, varlen_attention
from mm.common.errors import UserError

ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Numbers of a tower. `image_size // patch_size` squared is the size of the position table.

    rope: 2D rotary embedding on top of the table (Keye yes, SigLIP no).
    segments: "clip" lets all frames of a clip attend to each other (Keye Preview), "frame" one frame (Keye 1.5).
    attention: auto, sdpa or flash. Raises UserError for numbers that cannot be a tower.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    image_size: int = 384
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    rope: bool = True
    segments: str = "clip"
    attention: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"vision: hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        if self.rope and self.head_dim % 4:
            raise UserError(f"vision: 2D rotary embedding needs a head of 4n numbers, not {self.head_dim}")
        if self.segments not in ("clip", "frame"):
            raise UserError(f"vision: segments={self.segments!r} is not known; use clip or frame")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def table_side(self) -> int:
        return self.image_size // self.patch_size


def normalise(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 0..255 -> `dtype` -1..1 (mean and std 0.5, as SigLIP); floats are taken as normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    return pixels.float().div_(127.5).sub_(1.0).to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention inside each segment, not causal."""

    def __init__(self, hidden_size: int, heads: int, backend: str):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, segments: Segments, rope: tuple | None) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        o = varlen_attention(q, k, v, segments, causal=False, backend=self.backend)  # [N, H, d]
        return self.out_proj(o.flatten(1))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block; SigLIP's text tower uses it too."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, heads: int, eps: float, backend: str):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.self_attn = Attention(hidden_size, heads, backend)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, x: torch.Tensor, segments: Segments, rope: tuple | None = None) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), segments, rope)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of blocks, each recomputed in backward when `activation_checkpointing`."""

    def __init__(self, config):
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.layers = nn.ModuleList(
            Block(
                hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
                heads=config.num_attention_heads, eps=config.layer_norm_eps, backend=config.attention,
            ) for _ in range(config.num_hidden_layers)
        )  # fmt: skip

    def forward(self, x: torch.Tensor, segments: Segments, rope: tuple | None = None) -> torch.Tensor:
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, segments, rope, use_reentrant=False)
            else:
                x = layer(x, segments, rope)
        return x


class Embeddings(nn.Module):
    """Patches to vectors, plus the learned position table interpolated to each picture's grid."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.side = config.table_side
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        # The patches are cut already, so the convolution is a matrix product.
        weight = self.patch_embedding.weight
        x = F.linear(pixel_values.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)  # [N, D]
        return x + self.positions(grids).to(x.dtype)

    def positions(self, grids: list[list[int]]) -> torch.Tensor:
        """fp32 [N, D]: the table at each patch, bilinear, align_corners=False, the same in every frame."""
        table = self.position_embedding.weight.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        sizes = {(h, w) for _, h, w in grids}
        at = {
            s: F.interpolate(table, size=s, mode="bilinear", align_corners=False).flatten(2)[0].T for s in sizes
        }  # each [h * w, D]
        return torch.cat([at[h, w] if t == 1 else at[h, w].repeat(t, 1) for t, h, w in grids])


def row_column(grid_thw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of every patch of a packed row, int64 [N] each, raster order inside each frame."""
    sizes = grid_thw.prod(1)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    h, w = (grid_thw[:, i].repeat_interleave(sizes) for i in (1, 2))
    within = (torch.arange(len(starts), device=grid_thw.device) - starts) % (h * w)
    return within // w, within % w


class VisionTower(nn.Module):
    """SigLIP encoder over packed patches; parameter names are those of Hugging Face's SigLIP and Keye."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        resolve(config.attention)
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Features of every patch.

        Args:
            pixel_values: float [N, channels * patch * patch] in (channel, row, column) order, -1..1.
            grid_thw: int64 [M, 3], frames, rows and columns of patches; N is the sum of their products.
        Returns: [N, D] after the final layer norm, in the parameters' dtype.
        Raises: UserError where N and the grids disagree.
        """
        grids = grid_thw.tolist()
        lengths = self._lengths(grids)
        if sum(lengths) != len(pixel_values):
            raise UserError(f"vision tower: {len(pixel_values)} patches given, the grids speak of {sum(lengths)}")
        cu = torch.tensor([0, *lengths], device=pixel_values.device).cumsum(0, dtype=torch.int32)
        x = self.embeddings(pixel_values, grids)
        x = self.encoder(x, Segments.of(cu), self._rope(grid_thw) if self.config.rope else None)
        return self.post_layernorm(x)

    def _lengths(self, grids: list[list[int]]) -> list[int]:
        if self.config.segments == "clip":
            return [t * h * w for t, h, w in grids]
        return [h * w for t, h, w in grids for _ in range(t)]

    def _rope(self, grid_thw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 cos and sin [N, 1, d / 2]: the first half of the angles follows rows, the second columns."""
        inverse = inverse_frequencies(self.config.head_dim // 2, ROPE_THETA, grid_thw.device)
        row, column = row_column(grid_thw)
        angle = torch.cat([row[:, None] * inverse, column[:, None] * inverse], dim=1)[:, None]
        return angle.cos(), angle.sin()
