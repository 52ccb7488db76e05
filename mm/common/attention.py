"""Attention over packed sequences: the one road to SDPA and flash-attention for tower and decoder."""

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mm.common.errors import UserError


@dataclass(frozen=True)
class Segments:
    """Where the segments of a packed row lie; read from the device once per forward, not once per layer."""

    cu_seqlens: torch.Tensor  # int32 [S + 1]
    lengths: list[int]  # of the S segments
    longest: int

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor) -> "Segments":
        """From int32 [S + 1], 0 = first, N = last, not falling."""
        lengths = [b - a for a, b in itertools.pairwise(cu_seqlens.tolist())]
        return cls(cu_seqlens, lengths, max(lengths, default=0))


@functools.cache
def resolve(backend: str) -> str:
    """'auto' -> 'flash' on a GPU with flash-attn installed, else 'sdpa'. Asking for what is not there is an error."""
    if backend not in ("auto", "sdpa", "flash"):
        raise UserError(f"attention={backend!r} is not known; use auto, sdpa or flash")
    if backend == "sdpa":
        return "sdpa"
    try:
        import flash_attn  # noqa: F401

        have = torch.cuda.is_available()
    except ImportError:
        have = False
    if backend == "flash" and not have:
        raise UserError("attention=flash needs a GPU and flash-attn (pip install 'mmstack[gpu]'); use attention=sdpa")
    return "flash" if have else "sdpa"


def kernel(backend: str, *, half: bool) -> str:
    """What `varlen_attention` computes with on the device there is: "flash" or "sdpa"; `half`: in bf16 or fp16."""
    return "flash" if resolve(backend) == "flash" and (backend == "flash" or half) else "sdpa"


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | torch.Tensor, *,
    causal: bool, scale: float | None = None, backend: str = "sdpa",
) -> torch.Tensor:  # fmt: skip
    """Each segment of a packed row attends to itself alone.

    Args:
        q: [N, heads, dim]; k, v: [N, kv_heads, dim] with heads a multiple of kv_heads.
        segments: where they lie, or int32 cu_seqlens [S + 1], 0 = first, N = last, not falling.
        scale: softmax scale, dim ** -0.5 by default.
        backend: auto, sdpa or flash. auto takes flash only for what flash can do (half precision on a GPU).
    Returns: [N, heads, dim] in q's dtype.
    """
    where = segments if isinstance(segments, Segments) else Segments.of(segments)
    if kernel(backend, half=q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)) == "flash":
        from flash_attn import flash_attn_varlen_func

        cu, longest = where.cu_seqlens, where.longest
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=causal)
    return _sdpa(q, k, v, where.lengths, causal=causal, scale=scale)


def _sdpa(q, k, v, lengths: list[int], *, causal: bool, scale: float | None) -> torch.Tensor:
    """Runs of neighbouring segments of one length become one batched call: no mask, no padding, exact."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # torch's CPU kernel is two to three times slower in bfloat16 at the lengths of clips and questions.
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), lengths, causal=causal, scale=scale).to(q.dtype)
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths) if length]
    # One split, not a slice per run: a slice's backward would fill a tensor as long as the whole row.
    parts = [x.split([length * n for length, n in runs]) for x in (q, k, v)]
    out = []
    for (length, n), *qkv in zip(runs, *parts, strict=True):
        qs, ks, vs = (x.unflatten(0, (n, length)).transpose(1, 2) for x in qkv)  # [n, heads, length, dim]
        o = F.scaled_dot_product_attention(
            qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if out else torch.empty_like(q)


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """fp32 [dim / 2]: theta ** -(2 i / dim). Made anew each forward: a buffer would be lost by `to_empty`
    and rounded by `.to(bfloat16)`."""
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in fp32, dim i paired with i + dim / 2.

    Args: x: [N, heads, dim]; cos, sin: fp32 [N, 1, dim / 2]. Returns: as x, in x's dtype.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
