"""Preparatory stage, tiny only: a decoder that knows how to look things up in a picture before it can see one.

    mm run keye.told --size tiny                                     2 cores without bf16, 9 minutes

At small and 8b this stage does not exist. A decoder from nothing needs longest to learn what looks trivial: to find
the red thing and say what else it is. Pictures teach that slowly, with a tower in the way and few such words among
many others. So here the pictures are told: in place of what a tower sees, each visual token is the mean of the
embeddings of the words for what lies there (`mm/told.py`). A third are lists of all that a scene holds, and of what
it does not, each thing's words in any order: they ask for hardly anything but looking up. Nearly as many are plain
questions about single things, the others ask what stage 2 will. s1_align then teaches the projector to give those
words for what the tower sees.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, ObjectiveSpec, Optim, Stage


def stage(size: str) -> Stage:
    return Stage(
        name="keye.told", size=size, doc=__doc__, model=SIZES[size],
        start=["text"],
        train={"model.*": 1.0, "lm_head.*": 1.0},
        mix=[SourceSpec("told", 0.35), SourceSpec("told_ask", 0.3), SourceSpec("told_task", 0.3),
             SourceSpec("text_chat", 0.05)],
        objective=ObjectiveSpec("told"),
        optim=Optim(name="muon", lr=1e-3, momentum=0.9, weight_decay=0.05, schedule="wsd", warmup_steps=20,
                    decay_share=0.3),
        budget=Budget(tokens=1536, visual_tokens=1152, packs_per_step=2, steps=800),
        precision="auto", sharding="replicate",
    )  # fmt: skip
