"""Stage 3: the learning rate falls to nothing on a curated mix; models annealed on different mixes are averaged.

    mm run keye.s3_anneal_image --size tiny                          2 cores, about 40 seconds each
    mm run keye.s3_anneal_video --size tiny
    mm run keye --size tiny --to s3                                  both, then their average

Published: all parameters train on curated data; 1.5 judged 24 % video, 50 % image, 26 % text best by tokens; the
Preview ends by averaging models annealed on different mixtures. Not published, so ours: which mixtures (one of
pictures mostly, one with more video; at tiny more of the shop, to keep what s2_practice taught), their lengths, the
tower (at tiny the projector too, as in stage 2) at a tenth of the rate, equal weights in the average.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, Optim, Stage

_IMAGE = {
    "vit_pairs": 0.16, "caption": 0.08, "ocr": 0.16, "grounding": 0.08, "counting": 0.14, "vqa": 0.14,
    "interleaved": 0.04, "shop": 0.2,
}  # fmt: skip
IMAGE = {
    "tiny": {
        "vit_pairs": 0.08, "caption": 0.07, "ocr": 0.14, "grounding": 0.06, "counting": 0.17, "vqa": 0.1,
        "interleaved": 0.03, "shop": 0.35,
    },
    "small": _IMAGE, "8b": _IMAGE,
}  # fmt: skip
VIDEO = {"video_caption": 0.3, "video_qa": 0.64, "reorder": 0.06}
TEXT = {"tiny": {"text_chat": 0.75, "verdicts": 0.25}, "small": {"text_chat": 1.0}, "8b": {"text_chat": 1.0}}
# Shares of tokens of pictures, video and text.
MIXTURES = {"image": (0.70, 0.18, 0.12), "video": (0.46, 0.42, 0.12)}
BUDGETS = {
    "tiny": Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=80),
    "small": Budget(tokens=8192, visual_tokens=6144, packs_per_step=64, steps=4_000),
    "8b": Budget(tokens=131_072, visual_tokens=98_304, packs_per_step=32, steps=10_000),
}
OPTIM = {
    "tiny": Optim(name="muon", lr=5e-4, momentum=0.9, weight_decay=0.05, schedule="cosine", warmup_steps=10,
                  min_lr_ratio=0.0),
    "small": Optim(lr=3e-5, warmup_steps=100, min_lr_ratio=0.0),
    "8b": Optim(lr=1e-5, warmup_steps=200, min_lr_ratio=0.0),
}  # fmt: skip


def stage(size: str, mixture: str = "image") -> Stage:
    kinds = zip(MIXTURES[mixture], (IMAGE[size], VIDEO, TEXT[size]), strict=True)
    return Stage(
        name=f"keye.s3_anneal_{mixture}", size=size, doc=__doc__, model=SIZES[size],
        start=["s2_multitask"],  # in long runs at tiny: s2_practice (stages/keye/recipe.py)
        train={"*": 1.0, "visual.*": 0.1, **({"mlp_AR.*": 0.1} if size == "tiny" else {})},
        mix=[SourceSpec(name, share * weight) for share, kind in kinds for name, weight in kind.items()],
        optim=OPTIM[size], budget=BUDGETS[size], precision="auto",
        sharding="replicate" if size == "tiny" else "full",
    )  # fmt: skip
