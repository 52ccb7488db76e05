"""A stage: what starts from where, what trains, on which mix, towards which objective, within which budget.

Only plain numbers and strings, so that a stage saves as JSON beside its checkpoints and every knob can be
set from the command line (`--set optim.lr=1e-4`). Nothing here knows how many processes will run it.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from mm.common.config import to_dict
from mm.common.errors import UserError
from mm.common.precision import Precision

# What a person may change between two starts of one run without making it another run.
FREE = ("doc", "data", "log", "checkpoint", "expect")


class Stopped(Exception):
    """The run was asked to stop; it saved and can go on. Not an error, but what follows must not run."""


class FailedElsewhere(Exception):
    """Rank 0 has failed and says so itself; this rank only ends, with the same exit code."""

    def __init__(self, text: str, code: int):
        self.code = code
        super().__init__(text)


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective by its name in `stages/objectives`, and the options its constructor takes."""

    name: str = "next_token"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optim:
    """The optimizer and its schedule. `lr` is the peak; a pattern of `Stage.train` multiplies it.

    name: "adamw", or "muon": Muon on the matrices inside the model, AdamW on the rest. From random weights
    at tiny, Muon ends lower at equal steps and reaches AdamW's loss in half of them on text, in more on the tower
    (docs/benchmarks.md); the published weights were made with AdamW-like rules.
    betas and eps are AdamW's, momentum is Muon's.
    min_lr_ratio: the schedule ends at lr * min_lr_ratio. decay_share: the last share of the steps in which
    "wsd" falls. bad_steps: so many non-finite steps in a row are skipped; one more stops the run.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_share: float = 0.2
    bad_steps: int = 5


@dataclass(frozen=True)
class Budget:
    """The size of a step and of the run: tokens and visual tokens of one pack (for image-text pairs the
    second is the visual tokens of one micro-batch), packs of one optimizer step over all ranks, and steps."""

    tokens: int = 1024
    visual_tokens: int = 512
    packs_per_step: int = 1
    steps: int = 100


@dataclass(frozen=True)
class Reading:
    """`deadline`: seconds one picture or clip may take to decode. `max_bad`: share of the last 1000 samples that may
    be bad; beyond it the run stops."""

    deadline: float = 20.0
    max_bad: float = 0.05


@dataclass(frozen=True)
class Checkpoints:
    """A checkpoint every `every_steps` steps (0: only at the end and when stopped); the newest `keep` stay."""

    every_steps: int = 100
    keep: int = 2
    asynchronous: bool = True


@dataclass(frozen=True)
class Log:
    """A printed line every `every_steps` steps (the JSONL has them all), TensorBoard, and one more tracker."""

    every_steps: int = 1
    tensorboard: bool = True
    tracker: Literal["none", "wandb", "trackio"] = "none"
    project: str = "mmstack"


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    name: e.g. "keye.s2_multitask". size: "tiny", "small" or "8b"; a label, no code asks for it.
    model: the model's config (a dataclass such as `mm.keye.KeyeConfig`).
    start: artifacts the weights come from, in the order they are laid over each other, or ["scratch"].
    train: name pattern (as in fnmatch; `*` crosses dots) -> learning-rate multiplier. The last pattern that
        matches a parameter counts; what none matches, or a 0, is frozen.
    mix: the sources with their weights (`data_mix.mix.SourceSpec`).
    processor: how large pictures and frames are shown (`mm.processor.Processor`); None: as the size shows them.
    precision: of the multiplications; weights are fp32. "auto": bf16 on devices that have it in hardware.
    sharding: "full" cuts weights and optimizer over the ranks; "replicate" keeps them whole on each.
    expect: metric -> value a run of this size should reach.
    """

    name: str
    size: str
    model: Any
    train: dict[str, float]
    doc: str = ""
    start: list[str] = field(default_factory=lambda: ["scratch"])
    mix: list[Any] = field(default_factory=list)
    processor: Any = None
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    optim: Optim = field(default_factory=Optim)
    budget: Budget = field(default_factory=Budget)
    precision: Precision = "fp32"
    sharding: Literal["full", "replicate"] = "full"
    data: Reading = field(default_factory=Reading)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    expect: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def check(self) -> "Stage":
        """Itself, when its numbers make sense. Raises UserError naming the first that does not."""
        _positive(self.budget, "budget", "tokens", "packs_per_step", "steps")
        _positive(self.optim, "optim", "lr", "grad_clip", "eps")
        _positive(self.checkpoint, "checkpoint", "keep")
        _positive(self.log, "log", "every_steps")
        _positive(self.data, "data", "deadline")
        if self.checkpoint.every_steps < 0:
            raise UserError(f"{self.name}: checkpoint.every_steps={self.checkpoint.every_steps}; 0 or more")
        for key in ("min_lr_ratio", "decay_share"):
            if not 0 <= getattr(self.optim, key) <= 1:
                raise UserError(f"{self.name}: optim.{key}={getattr(self.optim, key)} must lie in 0 to 1")
        if not 0 <= self.optim.warmup_steps <= self.budget.steps:
            raise UserError(
                f"{self.name}: optim.warmup_steps={self.optim.warmup_steps} must lie in 0 to "
                f"budget.steps={self.budget.steps}"
            )
        return self

    def fingerprint(self) -> str:
        """16 hex digits of all that shapes the result; a checkpoint is resumed only under the same ones."""
        config = {k: v for k, v in to_dict(self).items() if k not in FREE}
        return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8).hexdigest()


def _positive(part: Any, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(part, key) <= 0:
            raise UserError(f"{name}.{key}={getattr(part, key)} must be above 0")


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted names whose values differ between two configs read as JSON, with both values."""
    out = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return out
