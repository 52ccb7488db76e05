"""What fresh parameters start from: a random stream of their own, by name."""

import math

import torch

from mm.common.seeds import derive

# A normal cut at two standard deviations keeps this share of its deviation.
TRUNCATED = 0.87962566103423978


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter: what others draw never changes it."""
    return torch.Generator().manual_seed(derive(seed, "init", name) % 2**63)


def siglip(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Start of a tower parameter, fp32 on the CPU, as SigLIP: xavier for attention and MLP, LeCun (truncated
    normal) for other matrices, N(0, 1 / sqrt(width)) for tables, norms 1, biases 0, temperature 10."""
    value, g = torch.empty(shape), stream(seed, name)
    part, _, kind = name.rpartition(".")
    part = part.rpartition(".")[2]
    if name == "logit_scale":
        return value.fill_(math.log(10.0))
    if kind.endswith("bias"):
        return value.normal_(0.0, 1e-6, generator=g) if part in ("fc1", "fc2") else value.zero_()
    if "norm" in part:
        return value.fill_(1.0)
    if part in ("position_embedding", "token_embedding"):
        return value.normal_(0.0, shape[-1] ** -0.5, generator=g)
    if part in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2") or kind in ("probe", "in_proj_weight"):
        return torch.nn.init.xavier_uniform_(value, generator=g)
    deviation = 1.0 / (TRUNCATED * math.sqrt(value[0].numel()))
    return torch.nn.init.trunc_normal_(value, 0.0, deviation, -2 * deviation, 2 * deviation, generator=g)
