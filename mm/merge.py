"""Average the weights of checkpoints that share a past (Keye-VL report 1, section 3: the end of annealing)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mm import formats
from mm.common.errors import UserError
from mm.common.files import read_json


def average(folders: Sequence[str | Path], out: str | Path, *, shares: Sequence[float] | None = None) -> Path:
    """Write to `out` the weighted mean of the models in `folders` (equal shares by default); returns `out`.

    Means are taken in fp32 and stored in the first model's dtype. Processor and tokenizer come from the first.
    Raises: UserError for no folder, shares that do not sum to 1, or folders that differ in anything but weights.
    """
    if not folders:
        raise UserError("nothing to average: name at least one model folder")
    shares = shares or [1 / len(folders)] * len(folders)
    if len(shares) != len(folders) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{len(folders)} models need {len(folders)} shares that sum to 1, not {list(shares)}")
    first, others = Path(folders[0]), [Path(f) for f in folders[1:]]
    for name in ("config.json", "processor.json", "tokenizer.json"):
        odd = [f for f in others if read_json(f / name) != read_json(first / name)]
        if odd:
            raise UserError(f"{odd[0]}/{name} differs from {first}/{name}: only models of one kind can be averaged")
    model, processor, tokenizer = formats.load(first)
    mean = {k: v.float() * shares[0] for k, v in model.state_dict().items()}
    for folder, share in zip(others, shares[1:], strict=True):
        for k, v in formats.load(folder)[0].state_dict().items():
            mean[k] += v.float() * share
    with torch.no_grad():
        for k, v in model.state_dict().items():
            v.copy_(mean[k])
    formats.save(out, model, processor, tokenizer)
    return Path(out)
