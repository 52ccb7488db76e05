"""Stage 0: the tower learns pictures of any shape, by matching them with their captions (sigmoid loss).

    mm run keye.s0_vit --size tiny                                   2 cores, a quarter of a minute
    torchrun ... -m stages.cli run keye.s0_vit --size 8b --siglip FOLDER --data vit_pairs=FOLDER

Published (report 1, section 3): SigLIP-so400m-384-14 goes on at native resolution with interpolated positions
and 2-D RoPE, the text tower also from SigLIP, about 500 B tokens. Not published, so ours: learning rates,
batch, temperature start. At tiny the tower comes from `keye.words`, the text tower starts from nothing; the
tower moves at a twentieth of the rate, as in a single trial whole captions taught it that what is red is never a
cube, which single words do not.
"""

from dataclasses import dataclass

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, ObjectiveSpec, Optim, Stage
from vision.text_tower import TextConfig
from vision.vit import VisionConfig


@dataclass(frozen=True)
class Towers:
    vision: VisionConfig
    text: TextConfig


def text_tower(vocab: int, hidden: int, mlp: int, layers: int, heads: int, bias: float = -10.0) -> TextConfig:
    return TextConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                      num_attention_heads=heads, projection_size=hidden, initial_bias=bias)  # fmt: skip


# SigLIP's own numbers at small (base) and 8b (so400m); its tokenizer has 32,000 entries.
TEXTS = {
    "tiny": text_tower(2048, 128, 256, 2, 4, bias=-4.4),  # about 80 pairs a step
    "small": text_tower(32_000, 768, 3072, 12, 12),
    "8b": text_tower(32_000, 1152, 4304, 27, 16),
}

BUDGETS = {
    "tiny": Budget(tokens=1024, visual_tokens=448, packs_per_step=2, steps=60),
    "small": Budget(tokens=16384, visual_tokens=16384, packs_per_step=8, steps=20_000),
    # 16,384 visual tokens (65,536 patches) x 128 packs x 60,000 steps = 0.5 T patches.
    "8b": Budget(tokens=16384, visual_tokens=16384, packs_per_step=128, steps=60_000),
}
OPTIM = {
    "tiny": Optim(name="muon", lr=4e-3, momentum=0.9, weight_decay=0.05, schedule="cosine", warmup_steps=20,
                  min_lr_ratio=0.05),
    "small": Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=1000),
    "8b": Optim(lr=2e-5, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=1000),
}  # fmt: skip


def stage(size: str) -> Stage:
    return Stage(
        name="keye.s0_vit", size=size, doc=__doc__,
        model=Towers(SIZES[size].vision, TEXTS[size]),
        start=["words" if size == "tiny" else "siglip"],
        train={"*": 1.0, "vision_model.*": 0.05, "vision_model.head.*": 1.0} if size == "tiny" else {"*": 1.0},
        mix=[SourceSpec("vit_pairs", 1.0, "samples")],
        objective=ObjectiveSpec("contrastive"),
        optim=OPTIM[size], budget=BUDGETS[size], precision="auto",
        sharding="replicate" if size == "tiny" else "full",
    )  # fmt: skip
