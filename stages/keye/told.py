"""Preparatory stages, tiny only: a decoder that knows how to look things up in a picture before it can see one.

    mm run keye.told --size tiny                                     2 cores without bf16, 9 minutes
    mm run keye.told_compare --size tiny                             then these: 4 minutes
    mm run keye.told_tasks --size tiny                               and 4

At small and 8b these stages do not exist. A decoder from nothing needs longest to learn what looks trivial: to find
the red thing and say what else it is. Pictures teach that slowly, with a tower in the way and few such words among
many others. So here the pictures are told: in place of what a tower sees, each visual token is the mean of the
embeddings of the words for what lies there (`mm/told.py`).

`told` looks up. A third are lists of all that a scene holds, and of what it does not, each thing's words in any
order: they ask for hardly anything but looking up. Nearly as many are plain questions about single things, the
others ask what stage 2 will. `told_compare` says what two pictures have in common and what not. In single trials no
model learnt that mixed with other tasks, or from yes and no alone; so it is learnt by itself, briefly, in small
packs. `told_tasks` asks what stage 2 will, the shop's tasks mostly, with a little of all before, and verdicts by
themselves (`data_mix/world/documents.py: verdicts`). s1_align then teaches the projector to give those words for what
the tower sees.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, ObjectiveSpec, Optim, Stage

PARTS = {
    "told": {"told": 0.35, "told_ask": 0.3, "told_task": 0.23, "told_shop": 0.07, "text_chat": 0.05},
    "told_compare": {"told_compare": 1.0},
    "told_tasks": {
        "told": 0.15, "told_ask": 0.1, "told_compare": 0.15, "told_task": 0.23, "told_shop": 0.27, "verdicts": 0.1,
    },
}
START = {"told": "text", "told_compare": "told", "told_tasks": "told_compare"}
BUDGETS = {
    "told": Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=800),
    "told_compare": Budget(tokens=768, visual_tokens=576, packs_per_step=2, steps=600),
    "told_tasks": Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=400),
}


def stage(size: str, part: str = "told") -> Stage:
    return Stage(
        name=f"keye.{part}", size=size, doc=__doc__, model=SIZES[size],
        start=[START[part]],
        train={"model.*": 1.0, "lm_head.*": 1.0},
        mix=[SourceSpec(name, share) for name, share in PARTS[part].items()],
        objective=ObjectiveSpec("told"),
        optim=Optim(name="muon", lr=1e-3, momentum=0.9, weight_decay=0.05, schedule="wsd", warmup_steps=20,
                    decay_share=0.3),
        budget=BUDGETS[part], precision="auto", sharding="replicate",
    )  # fmt: skip
