"""Attention over packed sequences: the one road to SDPA and flash-attention for tower and decoder."""

import itertools

import torch
import torch.nn.functional as F

from mm.common.errors import UserError


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


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *,
    causal: bool, scale: float | None = None, backend: str = "sdpa",
) -> torch.Tensor:  # fmt: skip
    """Each segment of a packed row attends to itself alone.

    Args:
        q: [N, heads, dim]; k, v: [N, kv_heads, dim] with heads a multiple of kv_heads.
        cu_seqlens: int32 [S + 1], 0 = first, N = last, not falling.
        scale: softmax scale, dim ** -0.5 by default.
    Returns: [N, heads, dim] in q's dtype.
    """
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=causal
        )
    return _sdpa(q, k, v, cu_seqlens.tolist(), causal=causal, scale=scale)


def _sdpa(q, k, v, bounds: list[int], *, causal: bool, scale: float | None) -> torch.Tensor:
    """Runs of neighbouring segments of one length become one batched call: no mask, no padding, exact."""
    out, start, i = [], 0, 0
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    while i < len(lengths):
        j = i
        while j < len(lengths) and lengths[j] == lengths[i]:
            j += 1
        n, length = j - i, lengths[i]
        i = j
        if length == 0:
            continue
        stop = start + n * length
        qs, ks, vs = (x[start:stop].view(n, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )  # [n, heads, length, dim]
        out.append(o.transpose(1, 2).reshape(n * length, q.shape[1], v.shape[2]))
        start = stop
    return torch.cat(out) if out else torch.empty_like(q)
