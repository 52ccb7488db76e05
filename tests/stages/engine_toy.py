"""Microscopic models and a synthetic loader for the engine's tests."""

from pathlib import Path

import torch

from mm.batch import Batch, PairBatch, RegionBatch
from mm.common import dist
from mm.common.errors import UserError
from mm.decoder import DecoderConfig
from mm.keye import Keye, KeyeConfig
from mm.told import Aligned
from stages.stage import Budget, Checkpoints, Log, ObjectiveSpec, Optim, Stage
from vision.text_tower import ContrastiveModel, TextConfig, TextTower
from vision.vit import VisionConfig, VisionTower

IMAGE = 60
VISION = VisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
)
KEYE = KeyeConfig(
    decoder=DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mrope_section=(2, 1, 1),
    ),
    vision=VISION, image_token_id=IMAGE, video_token_id=61,
)  # fmt: skip
TEXT = TextConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    projection_size=16, max_positions=16,
)  # fmt: skip


def keye(seed: int = 0, config: KeyeConfig = KEYE) -> Keye:
    model = Keye(config)
    model.init_weights(seed)
    return model


def aligned(seed: int = 0) -> Aligned:
    model = Aligned(KEYE)
    model.init_weights(seed)
    return model


def contrastive(seed: int = 0) -> ContrastiveModel:
    model = ContrastiveModel(VisionTower(VISION), TextTower(TEXT))
    model.init_weights(seed)
    return model


def pack(p: int, *, pictures: bool | None = None) -> Batch:
    """Pack number p: three segments, one with a picture unless p is a multiple of 3 (or as told)."""
    g = torch.Generator().manual_seed(1000 + p)
    pictures = p % 3 != 0 if pictures is None else pictures
    lengths = torch.randint(5, 9, (3,), generator=g).tolist()
    ids = torch.randint(0, 59, (sum(lengths),), generator=g)
    mask = torch.rand(len(ids), generator=g) < 0.7
    grid = torch.zeros(0, 3, dtype=torch.int64)
    if pictures:
        grid = torch.tensor([[1, 4, 2]])
        ids[1:3] = IMAGE
        mask[1:3] = False
    n = int(grid.prod(1).sum())
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Batch(
        input_ids=ids, loss_mask=mask, position_ids=torch.cat([torch.arange(k) for k in lengths]).expand(3, -1),
        cu_seqlens=starts.to(torch.int32),
        pixel_values=torch.randint(0, 256, (n, 48), generator=g, dtype=torch.uint8), grid_thw=grid,
        draws=[f"toy/{p}-{i}#0" for i in range(3)],
    )  # fmt: skip


def pairs(first: int, n: int) -> PairBatch:
    """Pairs number first .. first + n."""
    parts = []
    for i in range(first, first + n):
        g = torch.Generator().manual_seed(5000 + i)
        h, w, length = (int(torch.randint(1, 4, (1,), generator=g)) for _ in range(3))
        grid = [1, 2 * h, 2 * w]
        pixels = torch.randint(0, 256, (4 * h * w, 48), generator=g, dtype=torch.uint8)
        parts.append((torch.randint(0, 59, (length,), generator=g), grid, pixels))
    ids, grids, pixels = zip(*parts, strict=True)
    draws = [f"toy/{i}#0" for i in range(first, first + n)]
    return PairBatch(
        input_ids=torch.cat(ids), cu_seqlens=torch.tensor([0, *map(len, ids)]).cumsum(0).to(torch.int32),
        pixel_values=torch.cat(pixels), grid_thw=torch.tensor(grids), draws=draws,
    )  # fmt: skip


def regions(first: int, n: int, end: int | None = None) -> RegionBatch:
    """Pictures number first .. first + n, with one to three named regions each; `end`: last token of all names."""
    made, found, names, rivals = pairs(first, n), [], [], []
    for row, (_, h, w) in enumerate(made.grid_thw.tolist()):
        g = torch.Generator().manual_seed(9000 + first + row)
        for _ in range(1 + (first + row) % 3):
            top, left = int(torch.randint(0, h, (1,), generator=g)), int(torch.randint(0, w, (1,), generator=g))
            found.append([row, 0, top, left, h, w])
            names.append(torch.randint(0, 59, (1 + int(torch.randint(0, 4, (1,), generator=g)),), generator=g))
            if end is not None:
                names[-1][-1] = end
            told = torch.rand(len(names[-1]), 60, generator=g) < 0.5
            rivals.append(told.scatter(1, names[-1][:, None], True))
    return RegionBatch(
        input_ids=torch.cat(names), cu_seqlens=torch.tensor([0, *map(len, names)]).cumsum(0).to(torch.int32),
        pixel_values=made.pixel_values, grid_thw=made.grid_thw, regions=torch.tensor(found), draws=made.draws,
        words=torch.arange(60), rivals=torch.cat(rivals),
    )  # fmt: skip


class Loader:
    """Packs in order, by stride over ranks, with a position that no number of ranks changes."""

    def __init__(self, per_step: int, *, make=pack, fingerprint: str = "toy"):
        self.per_step, self.make, self.fingerprint, self.position = per_step, make, fingerprint, 0

    def __iter__(self):
        while True:
            mine = range(self.position + dist.rank(), self.position + self.per_step, dist.world_size())
            self.position += self.per_step
            yield [self.make(p) for p in mine]

    def state(self) -> dict:
        return {"position": self.position, "fingerprint": self.fingerprint}

    def load(self, state: dict) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise UserError("the data have changed")
        self.position = state["position"]


def stage(**changes) -> Stage:
    """Twelve steps of four packs on a microscopic Keye, everything trained."""
    steps, per_step = changes.pop("steps", 12), changes.pop("packs_per_step", 4)
    fields = {
        "name": "toy", "size": "tiny", "model": KEYE, "train": {"*": 1.0},
        "optim": Optim(lr=1e-2, warmup_steps=2), "log": Log(tensorboard=False),
        "budget": Budget(tokens=32, visual_tokens=4, packs_per_step=per_step, steps=steps),
        "checkpoint": Checkpoints(every_steps=4, keep=2), "objective": ObjectiveSpec(),
    }  # fmt: skip
    return Stage(**{**fields, **changes})


def hand_on(folder: Path, model: torch.nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, folder / "weights.pt")
