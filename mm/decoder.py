"""The language model: a Qwen3 decoder over a packed row, with rotary positions on three axes (mRoPE).

Shape legend: L tokens of all segments, S segments, D hidden, H heads, K key/value heads, d head_dim.
Parameter names are those of Hugging Face's Qwen3Model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mm.common.attention import Segments, inverse_frequencies, resolve, rotate, varlen_attention
from mm.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Numbers of a decoder. `mrope_section` shares head_dim / 2 frequencies among time, row and column.

    initializer_range: standard deviation of fresh weights. attention: auto, sdpa or flash.
    Raises UserError for numbers that cannot be a decoder.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    attention: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if 2 * sum(self.mrope_section) != self.head_dim or len(self.mrope_section) != 3:
            raise UserError(
                f"decoder: mrope_section {tuple(self.mrope_section)} must be three numbers whose sum is "
                f"half of head_dim {self.head_dim}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"decoder: {self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads"
            )


class KVCache:
    """Keys and values of S sequences while tokens are added to all of them one by one.

    The first forward (a packed row of prompts) fills it; each later one adds one token per sequence.
    Sequences have their own lengths: shorter ones are padded at the end and the padding is masked.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity  # tokens of the longest sequence, prompt and answer together
        self.keys: list[torch.Tensor] = []  # per layer [S, K, capacity, d]
        self.values: list[torch.Tensor] = []
        self.lengths: torch.Tensor | None = None  # int64 [S], tokens held; None before the first forward
        self.longest = 0

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, backend: str
    ) -> torch.Tensor:
        """Causal attention of the new tokens; q [L, H, d], k and v [L, K, d] -> [L, H, d]."""
        if self.lengths is None:
            self._fill(k, v, segments)
            return varlen_attention(q, k, v, segments, causal=True, backend=backend)
        rows = torch.arange(len(q), device=q.device)
        self.keys[layer][rows, :, self.lengths] = k
        self.values[layer][rows, :, self.lengths] = v
        top = self.longest + 1
        seen = torch.arange(top, device=q.device) <= self.lengths[:, None]  # [S, T]
        o = F.scaled_dot_product_attention(
            q[:, :, None], self.keys[layer][:, :, :top], self.values[layer][:, :, :top],
            attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1],
        )  # [S, H, 1, d]  # fmt: skip
        return o[:, :, 0]

    def _fill(self, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> None:
        cu = segments.cu_seqlens.long()
        row = torch.arange(len(cu) - 1, device=k.device).repeat_interleave(cu.diff())
        place = torch.arange(len(k), device=k.device) - cu[row]
        for held, new in ((self.keys, k), (self.values, v)):
            padded = new.new_zeros(len(cu) - 1, new.shape[1], self.capacity, new.shape[2])
            padded[row, :, place] = new
            held.append(padded)

    def advance(self, segments: Segments) -> None:
        """Count the tokens that every layer has now seen."""
        new = segments.cu_seqlens.diff().long()
        self.lengths = new if self.lengths is None else self.lengths + 1
        self.longest = segments.longest if self.longest == 0 else self.longest + 1

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all sequences but `rows` (int64)."""
        if self.lengths is not None:
            self.lengths = self.lengths[rows]
            self.longest = int(self.lengths.max())
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


class RMSNorm(nn.RMSNorm):
    """Statistics in fp32 whatever the input; under autocast the weight follows the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with a norm on each head's queries and keys."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.backend, self.head_dim = layer, config.attention, config.head_dim
        wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments, cache: KVCache | None
    ) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is None:
            o = varlen_attention(q, k, v, segments, causal=True, backend=self.backend)
        else:
            o = cache.attend(self.layer, q, k, v, segments, self.backend)
        return self.o_proj(o.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments, cache: KVCache | None
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings in, normalised hidden states out; the head that makes logits belongs to the caller."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        resolve(config.attention)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor,
        cache: KVCache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states after the final norm.

        Args:
            hidden: [L, D] input embeddings. position_ids: int64 [3, L]. cu_seqlens: int32 [S + 1].
            cache: filled by the first call; later calls bring one token per sequence (L = S).
        Returns: [L, D].
        """
        segments = Segments.of(cu_seqlens)
        rope = self._rope(position_ids)
        for layer in self.layers:
            if self.config.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                hidden = checkpoint(layer, hidden, rope, segments, None, use_reentrant=False)
            else:
                hidden = layer(hidden, rope, segments, cache)
        if cache is not None:
            cache.advance(segments)
        return self.norm(hidden)

    def _rope(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 cos and sin [L, 1, d / 2]: the first `mrope_section[0]` frequencies follow time, then row, column."""
        inverse = inverse_frequencies(self.config.head_dim, self.config.rope_theta, position_ids.device)
        shares = position_ids.float().T.split(1, dim=1)  # three of [L, 1]
        angle = torch.cat(
            [p * f for p, f in zip(shares, inverse.split(list(self.config.mrope_section)), strict=True)], dim=1
        )[:, None]
        return angle.cos(), angle.sin()
