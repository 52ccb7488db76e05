"""Stage 1: only the projector trains; it learns to say in the decoder's words what the tower sees.

    mm run keye.s1_align --size tiny                                 2 cores, a quarter of a minute
    torchrun ... -m stages.cli run keye.s1_align --size 8b --qwen3 FOLDER --data caption=FOLDER ...

Published: the 2x2-merge MLP starts from random weights, tower and Qwen3-8B are frozen, large-scale cross-modal
data, 8,192 tokens, data parallel with ZeRO-2. Not published, so ours: learning rate, batch, length.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, Optim, Stage

BUDGETS = {
    "tiny": Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=40),
    "small": Budget(tokens=8192, visual_tokens=6144, packs_per_step=32, steps=2_000),
    "8b": Budget(tokens=8192, visual_tokens=6144, packs_per_step=256, steps=5_000),
}
OPTIM = {
    "tiny": Optim(name="muon", lr=5e-3, weight_decay=0.0, schedule="wsd", warmup_steps=10, decay_share=0.3),
    "small": Optim(lr=1e-3, weight_decay=0.0, warmup_steps=100),
    "8b": Optim(lr=1e-3, weight_decay=0.0, warmup_steps=200),
}


def stage(size: str) -> Stage:
    return Stage(
        name="keye.s1_align", size=size, doc=__doc__, model=SIZES[size],
        start=["told" if size == "tiny" else "qwen3", "s0_vit"],
        train={"mlp_AR.*": 1.0},
        mix=[SourceSpec("vit_pairs", 0.5), SourceSpec("caption", 0.3), SourceSpec("video_caption", 0.2)],
        optim=OPTIM[size], budget=BUDGETS[size], precision="auto",
        sharding="replicate" if size == "tiny" else "full",
    )  # fmt: skip
