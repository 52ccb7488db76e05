"""What a stage will cost, worked out before anything is built: the model stands on the meta device."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import nn

from mm.batch import RegionBatch
from mm.common.errors import UserError
from mm.common.progress import duration
from mm.parallelize import blocks
from stages import objectives
from stages.engine import optim
from stages.engine.flops import module_of
from stages.engine.log import MEMORY, PEAKS
from stages.stage import Stage

HEAD_CHUNK = 1024  # rows of logits held at once (mm.keye.token_logprobs)
NAMES = {"embedding": "decoder", "head": "decoder"}  # told together with what they belong to
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Figures of one stage on `gpus` ranks.

    pieces: equal segments (pictures) a pack is taken to hold. modules: name -> (parameters, of which train).
    memory: bytes of one rank by kind; memory_other: their sum with activation checkpointing the other way.
    disk: bytes of the whole run. seconds: at `utilisation` of the devices' peak FLOP/s.
    """

    stage: Stage
    gpus: int
    device: str
    utilisation: float
    pieces: int
    modules: dict[str, tuple[int, int]]
    tokens_per_step: int
    flops_per_pack: float
    flops_per_token: float
    flops_per_step: float
    flops_total: float
    memory: dict[str, float]
    memory_other: float
    disk: dict[str, float]
    seconds: float

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())


def plan(
    stage: Stage, model: Any, gpus: int = 1, *, device: str = "H100", utilisation: float = 0.4,
    picture_tokens: int = 256, peak: float | None = None,
) -> Plan:  # fmt: skip
    """Work out a stage.

    Args:
        model: unsharded, on the meta device (`with torch.device("meta"): Keye(stage.model)`).
        device: a name in `stages.engine.log.PEAKS`, unless `peak` (FLOP/s) is given.
        utilisation: share of the peak the model's FLOPs are taken to reach.
        picture_tokens: visual tokens of one picture; a pack holds as many segments as pictures fit.
    Raises UserError for an unknown device, or a pattern that matches nothing.
    """
    best = peak or PEAKS.get(device)
    if best is None or gpus < 1 or not 0 < utilisation <= 1:
        raise UserError(
            f"mm plan: device={device!r} (known: {', '.join(PEAKS)}, or give a peak in FLOP/s), gpus={gpus} (1 or "
            f"more), utilisation={utilisation} (above 0, up to 1)"
        )
    budget = stage.check().budget
    selection = optim.select(model, stage.train)
    objective = objectives.make(stage.objective)
    pieces = max(budget.visual_tokens // picture_tokens, 1)
    with torch.device("cpu"):  # also inside a caller's `with torch.device("meta")`
        pack = objective.shaped(model, budget, pieces)
    flops, tokens = objective.flops(model, [pack]), int(objective.measure([pack])["tokens"])
    step = flops * budget.packs_per_step
    kinds = [memory(stage, model, selection, gpus, pack, other=other) for other in (False, True)]
    return Plan(
        stage=stage, gpus=gpus, device=device, utilisation=utilisation, pieces=pieces, modules=_modules(model),
        tokens_per_step=tokens * budget.packs_per_step, flops_per_pack=flops, flops_per_token=flops / tokens,
        flops_per_step=step, flops_total=step * budget.steps, memory=kinds[0], memory_other=sum(kinds[1].values()),
        disk=disk(stage, model, selection), seconds=step * budget.steps / (gpus * best * utilisation),
    )  # fmt: skip


def _modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, p in model.named_parameters():
        part = NAMES.get(module_of(name), module_of(name))
        total, trained = found.get(part, (0, 0))
        found[part] = (total + p.numel(), trained + p.numel() * p.requires_grad)
    return found


def shard_numel(p: torch.Tensor, ranks: int) -> int:
    """Elements of `p` on rank 0, which has the most: FSDP cuts the first dimension into equal chunks."""
    return p.numel() if p.ndim == 0 else math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:])


def _local(params: Iterable[torch.Tensor], ranks: int, size: int = 4) -> float:
    return float(sum(shard_numel(p, ranks) for p in params) * size)


def optimizer_bytes(stage: Stage, model: nn.Module, selection: optim.Selection, ranks: int) -> float:
    """Exact bytes of optimizer state on rank 0."""
    matrices = optim.hidden_matrices(model) if stage.optim.name == "muon" else set()
    total = 0.0
    for name, p in model.named_parameters():
        if name in selection:
            for value in optim.blank_state(p, name in matrices).values():
                total += shard_numel(value, ranks) * value.element_size()
    return total


def memory(
    stage: Stage, model: Any, selection: optim.Selection, ranks: int, pack: Any, *, other: bool = False
) -> dict[str, float]:
    """Bytes on rank 0 by kind; `other`: with activation checkpointing the other way. Weights, gradients and
    optimizer are exact; the rest is an estimate."""
    params = list(model.parameters())
    trained = [p for p in params if p.requires_grad]
    found = {
        "weights (fp32)": _local(params, ranks), "gradients (fp32)": _local(trained, ranks),
        "optimizer": optimizer_bytes(stage, model, selection, ranks),
    }  # fmt: skip
    width = 4 if stage.precision == "fp32" else 2  # auto: all GPUs of PEAKS have bf16
    if ranks > 1:
        found["gathered weights"] = gathered_bytes(model, width)
    found |= activations(model, pack, width, other=other)
    return found


def gathered_bytes(model: nn.Module, width: int) -> float:
    """The root group stays whole, one block is in use while the next arrives; gradients of one block in full."""
    inside = blocks(model)
    held = {id(p) for block in inside for p in block.parameters()}
    root = sum(p.numel() for p in model.parameters() if id(p) not in held)
    largest = max((sum(p.numel() for p in block.parameters()) for block in inside), default=0)
    return float(width * (root + 3 * largest))


def layer_elements(c: Any) -> tuple[int, int]:
    """Elements of one token (or patch) that one block keeps for its backward: all of them, and only its input.

    Counted over our own blocks: each matrix product keeps its input, each norm its input, attention q, k, v and
    its output, rotation its result, the MLP what its activation needs.
    """
    d, i = c.hidden_size, c.intermediate_size
    if hasattr(c, "num_key_value_heads"):  # decoder: RMSNorm, q and k norms, gated MLP
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return 4 * d + 4 * q + 4 * kv + 4 * i, d
    return 9 * d + 2 * i, d


def activations(model: Any, pack: Any, width: int, *, other: bool = False) -> dict[str, float]:
    """Estimates for one pack: what the blocks of each tower and of the decoder keep for the backward (nothing,
    where no gradient passes: a frozen decoder passes on the projector's and the tower's), and the chunk of logits.
    Named regions never come to a decoder."""
    found = {}
    for module in _configured(model):
        config = module.config
        part, rows = _part(pack, config)
        if part == "decoder" and isinstance(pack, RegionBatch):
            continue
        passes = any(p.requires_grad for p in (model if part == "decoder" else module).parameters())
        every, only = layer_elements(config)
        layers, recomputed = config.num_hidden_layers, config.activation_checkpointing != other
        kept = only * layers + every if recomputed else every * layers
        name = f"activations, {part}" + (" (recomputed)" if recomputed else "")
        found[name] = float(width * rows * kept * passes)
        if part == "decoder":  # the fp32 logits of a chunk, their copy in `width`, and both gradients
            found["logits of a chunk"] = HEAD_CHUNK * config.vocab_size * (4.0 + width) * 2
    return found


def _part(pack: Any, config: Any) -> tuple[str, int]:
    """What a module with this config is called, and how many rows of a pack go through it."""
    if hasattr(config, "patch_size"):
        return "tower", pack.pixel_values.shape[0]
    return "decoder" if hasattr(config, "num_key_value_heads") else "text tower", pack.input_ids.numel()


def _configured(model: nn.Module) -> list[Any]:
    """Modules whose config has layers of its own: the towers and the decoder."""
    return [m for m in model.modules() if hasattr(getattr(m, "config", None), "num_hidden_layers")]


def disk(stage: Stage, model: nn.Module, selection: optim.Selection) -> dict[str, float]:
    """Bytes a run lays down, over all ranks: the frozen weights once, and each checkpoint."""
    whole = {n: p.numel() * 4.0 for n, p in model.named_parameters()}
    one = sum(whole[n] for n in selection) + optimizer_bytes(stage, model, selection, 1)
    return {
        "frozen weights, once": sum(b for n, b in whole.items() if n not in selection),
        "one checkpoint": one,
        f"at most ({stage.checkpoint.keep} kept, one being written)": one * (stage.checkpoint.keep + 1),
        "model handed on": sum(whole.values()),
    }


def table(p: Plan) -> Group:
    """The plan as tables to print."""
    budget, ranks = p.stage.budget, f"{p.gpus} x {p.device}"
    parts = Table(title=f"{p.stage.name}, size {p.stage.size}: parameters")
    for column in ("module", "parameters", "train"):
        parts.add_column(column, justify="left" if column == "module" else "right")
    for name, (total, trained) in p.modules.items():
        parts.add_row(name, f"{total:,}", f"{trained:,}" if trained else "frozen")
    parts.add_row("all", *(f"{sum(v[i] for v in p.modules.values()):,}" for i in (0, 1)), style="bold")
    work = Table(title="work (training FLOPs of tower, projector and decoder, attention included)", show_header=False)
    pack = f"{budget.tokens:,} tokens, {budget.visual_tokens:,} of them visual, in {p.pieces} segments"
    for row in (
        ("a full pack", pack), ("a step", f"{budget.packs_per_step} packs, {p.tokens_per_step:,} tokens"),
        ("FLOPs per token", f"{p.flops_per_token:.3g}"), ("FLOPs per step", f"{p.flops_per_step:.3g}"),
        ("FLOPs in all", f"{p.flops_total:.3g}"),
        ("steps, tokens in all", f"{budget.steps:,}, {p.tokens_per_step * budget.steps:.3g}"),
        ("time", f"{duration(p.seconds)} on {ranks} at {p.utilisation:.0%} of peak (an assumption)"),
    ):  # fmt: skip
        work.add_row(*row)
    room = Table(title=f"memory of one rank of {p.gpus} (activations and gathered weights are estimates)")
    room.add_column("kind")
    room.add_column("GB", justify="right")
    for name, size in p.memory.items():
        room.add_row(name, f"{size / GB:.3f}")
    room.add_row("all", f"{p.memory_total / GB:.3f}", style="bold")
    room.add_row("all, were activation checkpointing the other way", f"{p.memory_other / GB:.3f}", style="dim")
    has = MEMORY.get(p.device)
    if has is not None:
        fits = p.memory_total / GB <= has
        room.add_row(f"one {p.device} has", f"{has}", style="" if fits else "bold red")
        if not fits:
            room.caption = ("does not fit: lower budget.tokens and budget.visual_tokens, take more GPUs, or turn "
                            "activation_checkpointing on")  # fmt: skip
    store = Table(title="disk")
    store.add_column("what")
    store.add_column("GB", justify="right")
    for name, size in p.disk.items():
        store.add_row(name, f"{size / GB:.3f}")
    return Group(parts, work, room, store)
