"""In which precision matrices are multiplied: what a stage asks for, and what the machine is made for."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from mm.common import dist

Precision = Literal["fp32", "bf16", "auto"]


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 in hardware. Where a CPU does not, torch emulates it, and a step takes about
    twice as long as in fp32 (docs/benchmarks.md). A torch that cannot tell counts as no."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def settle(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """"auto" -> "bf16" where every rank's device has it, else "fp32"; anything else stays. Every rank calls it."""
    if precision != "auto":
        return precision
    return "bf16" if all(dist.gather_objects(has_bf16(device))) else "fp32"
