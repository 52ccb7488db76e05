"""What fresh parameters start from: a random stream of their own, by name."""

import math

import torch

from mm.common.seeds import derive

# A normal cut at two standard deviations keeps this share of its deviation.
TRUNCATED = 0.87962566103423978
NEAR = 1.0  # bias of queries and keys in the first half of a tower's heads: under RoPE they start by looking near
WAVES = 0.35  # amplitude of the waves that a position table starts with
LESS = 0.5  # values and output of each attention start as -LESS times the identity: what differs from around it


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter: what others draw never changes it."""
    return torch.Generator().manual_seed(derive(seed, "init", name) % 2**63)


def siglip(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Start of a tower parameter, fp32 on the CPU: xavier for MLPs, LeCun (truncated normal) for other matrices,
    N(0, 1 / sqrt(width)) for tables of text, norms 1, biases 0, temperature 10, as SigLIP; ours are attention
    (`_attention`) and the table of places (`_waves`)."""
    value, g = torch.empty(shape), stream(seed, name)
    path, _, kind = name.rpartition(".")
    part = path.rpartition(".")[2]
    if name == "logit_scale":
        return value.fill_(math.log(10.0))
    if part in ("q_proj", "k_proj", "v_proj", "out_proj") and ".layers." in name:
        return _attention(path, part, kind, value, seed)
    if kind.endswith("bias"):
        return value.normal_(0.0, 1e-6, generator=g) if part in ("fc1", "fc2") else value.zero_()
    if "norm" in part:
        return value.fill_(1.0)
    if part == "position_embedding" and not name.startswith("text_model."):
        return _waves(shape)
    if part in ("position_embedding", "token_embedding"):
        return value.normal_(0.0, shape[-1] ** -0.5, generator=g)
    if part in ("out_proj", "fc1", "fc2") or kind in ("probe", "in_proj_weight"):
        return torch.nn.init.xavier_uniform_(value, generator=g)
    deviation = 1.0 / (TRUNCATED * math.sqrt(value[0].numel()))
    return torch.nn.init.trunc_normal_(value, 0.0, deviation, -2 * deviation, 2 * deviation, generator=g)


def _waves(shape: torch.Size) -> torch.Tensor:
    """[side * side, D]: half of the numbers tell the row, half the column, each by waves of one to four half turns
    over the picture, so that places near each other start alike and a mean of places is a place."""
    side, k = math.isqrt(shape[0]), torch.arange(shape[1] // 4)
    angle = torch.arange(side)[:, None] * (math.pi / side * (1 + k % 4)) + 0.7 * k
    line = WAVES * torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D / 2]
    return torch.cat([line.repeat_interleave(side, dim=0), line.repeat(side, 1)], dim=1)


def _attention(path: str, part: str, kind: str, value: torch.Tensor, seed: int) -> torch.Tensor:
    """Mimetic initialisation (Trockman and Kolter 2023, arXiv 2305.09828): queries equal keys, so a patch starts by
    looking at what is like it; values and output cancel to -LESS, so it starts by seeing how it differs from that.
    Ours: a bias that makes half of the heads look near (`NEAR`). `benchmarks/tower.py` sets both together against
    SigLIP's start."""
    first = "q_proj" if part in ("q_proj", "k_proj") else "v_proj"
    g = stream(seed, path.removesuffix(part) + first)
    if kind == "bias":
        value.zero_()
        if first == "q_proj":
            value[: len(value) // 2] = NEAR
        return value
    if first == "q_proj":
        return torch.nn.init.xavier_uniform_(value, generator=g)
    torch.nn.init.orthogonal_(value, generator=g)
    return (value if part == "v_proj" else -value.T) * LESS**0.5
