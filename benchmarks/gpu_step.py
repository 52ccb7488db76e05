"""For a GPU: flash-attention against SDPA, and the share of the peak that a decoder step reaches.

First the parity: packed attention through flash-attn, bf16, and SDPA, bf16, each against SDPA in fp32, forward
and all three gradients; flash may be off by no more than 1.5 times what SDPA in bf16 is off by, plus 1e-3.
Then the step: Qwen3-0.6B's decoder (size small), forward, backward and fused AdamW on one pack of equal
segments, timed with events after warm-up; MFU = model FLOPs of stages.engine.flops / seconds / the vendor's
dense bf16 peak. Needs a CUDA GPU; the flash part needs flash-attn and is said to be left out without it.

    python benchmarks/gpu_step.py
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import harness
import torch

from mm.common.attention import resolve, varlen_attention
from mm.common.errors import UserError
from mm.keye import Keye
from mm.sizes import SIZES
from stages.engine.log import peak
from stages.objectives.next_token import NextToken
from stages.stage import Budget

MARGIN, FLOOR = 1.5, 1e-3
LENGTHS = [1, 17, 500, 64, 64, 1300, 2]  # of the segments that parity is tried on


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--tokens", type=int, default=16384, help="of the pack")
    p.add_argument("--segments", type=int, default=16)
    p.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    return p.parse_args(argv)


def has_flash() -> bool:
    return resolve("auto") == "flash"


def attention(inputs: list[torch.Tensor], cu: torch.Tensor, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """Output and the gradients of q, k, v, in fp32; the inputs are the same numbers in every dtype."""
    q, k, v, g = (x.to(dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(leaves[0], leaves[1], leaves[2], cu, causal=True, backend=backend)
    return [x.float() for x in (out, *torch.autograd.grad(out, leaves, g))]


def parity(device: torch.device) -> dict[str, dict[str, float]]:
    """Largest difference from SDPA in fp32: backend -> tensor -> difference."""
    d, n = SIZES["small"].decoder, sum(LENGTHS)
    random = torch.Generator(device).manual_seed(0)
    heads = (d.num_attention_heads, d.num_key_value_heads, d.num_key_value_heads, d.num_attention_heads)
    inputs = [
        torch.randn(n, h, d.head_dim, device=device, generator=random).bfloat16().float() for h in heads
    ]  # fmt: skip
    cu = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    want = attention(inputs, cu, torch.float32, "sdpa")
    found = {}
    for backend in ("sdpa", "flash") if has_flash() else ("sdpa",):
        got = attention(inputs, cu, torch.bfloat16, backend)
        found[backend] = {
            name: float((a - b).detach().abs().max())
            for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)
        }
    return found


def judge_parity(found: dict[str, dict[str, float]]) -> str:
    if "flash" not in found:
        return "left out"
    close = all(found["flash"][k] <= MARGIN * found["sdpa"][k] + FLOOR for k in found["sdpa"])
    return "met" if close else "not met"


def step_seconds(a: argparse.Namespace, backend: str, device: torch.device) -> tuple[list[float], float]:
    """(seconds of a step in each round, model FLOPs of a step)."""
    size = SIZES["small"]
    decoder = replace(size.decoder, attention=backend, activation_checkpointing=a.checkpointing)
    with torch.device(device):
        model = Keye(replace(size, decoder=decoder))
    model.init_weights(0)
    objective: Any = NextToken()
    batch = objective.shaped(model, Budget(tokens=a.tokens, visual_tokens=0), a.segments).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    counts = objective.counts([batch])

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            objective.accumulate(model, [batch], counts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    return [_timed(step, a.steps) for _ in range(a.rounds)], objective.flops(model, [batch])


def _timed(step: Any, n: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / n


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU and there is none here; nothing was measured")
    harness.begin(a)
    device, about = torch.device("cuda"), harness.machine()
    about["gpu"] = torch.cuda.get_device_name(device)
    found, best = parity(device), peak(device)
    rows: list[tuple[str, str, str, str]] = [
        (f"{backend} bf16 against SDPA fp32, largest difference",
         ", ".join(f"{k} {v:.1e}" for k, v in worst.items()), "", judge_parity(found) if backend == "flash" else "")
        for backend, worst in found.items()
    ]  # fmt: skip
    figures: harness.Json = {"parity": found, "steps": {}}
    for backend in found:
        seconds, flops = step_seconds(a, backend, device)
        speed = harness.spread([a.tokens / s for s in seconds])
        mfu = flops / statistics.median(seconds) / best if best else None
        figures["steps"][backend] = {"tokens_per_second": speed, "flops": flops, "mfu": mfu}
        rows.append((f"step with {backend}", f"{harness.shown(speed, '.0f')} tokens/s",
                     "peak not known" if mfu is None else f"MFU {mfu:.1%}", ""))  # fmt: skip
    notes = [] if "flash" in found else ["flash-attn is not installed: its parity and step were left out"]
    notes.append(f"small, bf16 autocast, {a.tokens} tokens in {a.segments} segments, {a.rounds} rounds of {a.steps}")
    return harness.report(a, "GPU step", about, ("", "figure", "", ""), rows, figures, notes)


if __name__ == "__main__":
    harness.run(main)
