"""Stage 2's hardest tasks alone, at tiny only: what a mix of everything does not teach is practised before stage 3.

    mm run keye.s2_practice --size tiny                              2 cores, a minute

Not published, and not at small or 8b, where stage 3 follows stage 2. With a tiny model's few tokens a step, comparing
pictures (the same product? the same topic? which episode comes first?) and frames (which way does it slide?) stayed
at chance in every mix of everything that was tried; with little else around it comes within some hundred steps, and
stage 3's mixes keep most of it while what was forgotten meanwhile comes back. What is nearly known (rude comments,
likes) is asked along: alone, the others would wipe it out.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, Optim, Stage

MIX = {
    "kc_spu": 0.24, "kc_video_topic": 0.27, "kc_video_order": 0.2, "motion": 0.17, "kc_porncomment": 0.07,
    "kc_high_like": 0.05,
}  # fmt: skip


def stage(size: str) -> Stage:
    return Stage(
        name="keye.s2_practice", size=size, doc=__doc__, model=SIZES[size],
        start=["s2_multitask"],
        train={"*": 1.0, "visual.*": 0.1},
        mix=[SourceSpec(name, weight) for name, weight in MIX.items()],
        optim=Optim(name="muon", lr=1e-3, momentum=0.9, weight_decay=0.05, schedule="wsd", warmup_steps=20,
                    decay_share=0.2, min_lr_ratio=0.3),
        budget=Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=110),
        precision="bf16", sharding="replicate",
    )  # fmt: skip
