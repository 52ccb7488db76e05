"""Stage 2: everything trains (at tiny all but the tower), on every kind of task at once.

    mm run keye.s2_multitask --size tiny                             2 cores without bf16, 4 minutes
    torchrun ... -m stages.cli run keye.s2_multitask --size 8b --from RUN --data caption=FOLDER ...

Published: tower, projector and decoder all train on caption, OCR, grounding and counting (integer coordinates
in [0, 1000) between box and point tokens), VQA, interleaved documents, video with frame re-ordering, and text;
8,192 tokens, data parallel with ZeRO-2. Not published, so ours: shares, learning rates (the tower a tenth), batch,
length. Against the publication, at tiny the tower stays as `keye.words` left it until stage 3: in single trials some
hundred steps at a tenth of the rate taught it nothing that showed, and made a step a third slower or more. The
projector, which knows its words from s1_align, moves at a tenth. Boxes are few in tiny's mix: their digits made two
fifths of the loss, and no box was learnt.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, Optim, Stage

_MIX = {
    "vit_pairs": 0.02, "caption": 0.09, "ocr": 0.06, "grounding": 0.06, "counting": 0.09, "vqa": 0.04,
    "interleaved": 0.03, "video_caption": 0.22, "video_qa": 0.13, "reorder": 0.005, "shop": 0.165, "text_chat": 0.09,
}  # fmt: skip
_TINY = {
    "vit_pairs": 0.02, "caption": 0.06, "ocr": 0.06, "grounding": 0.015, "counting": 0.1, "vqa": 0.06,
    "interleaved": 0.03, "video_caption": 0.2, "video_qa": 0.16, "reorder": 0.005, "shop": 0.23, "text_chat": 0.03,
    "verdicts": 0.03,
}  # fmt: skip
MIX = {"tiny": _TINY, "small": _MIX, "8b": _MIX}
BUDGETS = {
    "tiny": Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=300),
    "small": Budget(tokens=8192, visual_tokens=6144, packs_per_step=64, steps=20_000),
    "8b": Budget(tokens=8192, visual_tokens=6144, packs_per_step=512, steps=100_000),
}
OPTIM = {
    "tiny": Optim(name="muon", lr=5e-4, momentum=0.9, weight_decay=0.05, schedule="wsd", warmup_steps=20,
                  decay_share=0.2, min_lr_ratio=0.3),
    "small": Optim(lr=1e-4, warmup_steps=500, schedule="wsd", min_lr_ratio=0.3),
    "8b": Optim(lr=4e-5, warmup_steps=1000, schedule="wsd", min_lr_ratio=0.3),
}  # fmt: skip


def stage(size: str) -> Stage:
    return Stage(
        name="keye.s2_multitask", size=size, doc=__doc__, model=SIZES[size],
        start=["s1_align"],
        train={"*": 1.0, "visual.*": 0.0, "mlp_AR.*": 0.1} if size == "tiny" else {"*": 1.0, "visual.*": 0.1},
        mix=[SourceSpec(name, weight) for name, weight in MIX[size].items()],
        optim=OPTIM[size], budget=BUDGETS[size], precision="auto",
        sharding="replicate" if size == "tiny" else "full",
    )  # fmt: skip
