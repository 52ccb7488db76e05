"""Stage 1: only the projector trains; it learns to say in the decoder's words what the tower sees.

    mm run keye.s1_align --size tiny                                 2 cores, one minute
    torchrun ... -m stages.cli run keye.s1_align --size 8b --qwen3 FOLDER --data caption=FOLDER ...

Published: the 2x2-merge MLP starts from random weights, tower and Qwen3-8B are frozen, large-scale cross-modal
data, 8,192 tokens, data parallel with ZeRO-2. Not published, so ours: learning rate, batch, length, and that
the second matrix starts small, so that pictures begin no louder than words.

Against the publication, at tiny no caption is learnt. There the decoder can read pictures told in words
(`stages/keye/told.py`), so what the projector ought to give is known at every place of a picture whose regions are
named: what the same picture, told, gives (`mm/told.py: Aligned`). Learning that takes a minute, and hands on at once
what the decoder does with told pictures. It learns to tell words from their rivals more than to be near what is told:
by distance alone, in single trials, it took that no picture shows a red cube for a sign that nothing red is one
(`benchmarks/projector.py` sets the two, and captions, against each other).
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, ObjectiveSpec, Optim, Stage

BUDGETS = {
    "tiny": Budget(tokens=1536, visual_tokens=1536, packs_per_step=2, steps=150),
    "small": Budget(tokens=8192, visual_tokens=6144, packs_per_step=32, steps=2_000),
    "8b": Budget(tokens=8192, visual_tokens=6144, packs_per_step=256, steps=5_000),
}
OPTIM = {
    "tiny": Optim(name="muon", lr=5e-3, weight_decay=0.0, schedule="cosine", warmup_steps=10, min_lr_ratio=0.02),
    "small": Optim(lr=1e-3, weight_decay=0.0, warmup_steps=100),
    "8b": Optim(lr=1e-3, weight_decay=0.0, warmup_steps=200),
}

MIX = [SourceSpec("vit_pairs", 0.5), SourceSpec("caption", 0.3), SourceSpec("video_caption", 0.2)]
NAMED = [SourceSpec("regions", 0.6, "samples"), SourceSpec("tracks", 0.4, "samples")]


def stage(size: str) -> Stage:
    tiny = size == "tiny"
    return Stage(
        name="keye.s1_align", size=size, doc=__doc__, model=SIZES[size],
        start=["told_tasks" if tiny else "qwen3", "s0_vit"],
        train={"mlp_AR.*": 1.0},
        mix=NAMED if tiny else MIX,
        objective=ObjectiveSpec("told_features" if tiny else "next_token"),
        optim=OPTIM[size], budget=BUDGETS[size], precision="auto",
        sharding="replicate" if tiny else "full",
    )  # fmt: skip
