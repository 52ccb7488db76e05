"""In which precision matrices are multiplied: what a stage asks for, and what the machine is made for."""

from typing import Literal

import torch

from mm.common import dist

Precision = Literal["fp32", "bf16", "auto"]


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 in hardware. Where a CPU does not, torch emulates it, several times slower than
    fp32 (docs/benchmarks.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def settle(precision: Precision, device: torch.device) -> Precision:
    """"auto" -> "bf16" where every rank's device has it, else "fp32"; anything else stays. Every rank calls it."""
    if precision != "auto":
        return precision
    return "bf16" if all(dist.gather_objects(has_bf16(device))) else "fp32"
