"""Preparatory stage, tiny only: a decoder that knows the world's language before it sees anything.

    mm run keye.text --size tiny                                     2 cores without bf16, 4 minutes

At small and 8b this stage does not exist: the decoder is a local Qwen3 folder (`--qwen3 FOLDER`). Here it is
trained from nothing on the bundled world's text: scenes described in words, questions answered from the
description, and things named in a row and then in another order. So the circuits that look something up in the
context exist before vision has to use them.
"""

from data_mix.mix import SourceSpec
from mm.sizes import SIZES
from stages.stage import Budget, Optim, Stage


def stage(size: str) -> Stage:
    return Stage(
        name="keye.text", size=size, doc=__doc__, model=SIZES[size],
        start=["scratch"],
        train={"model.*": 1.0, "lm_head.*": 1.0},
        mix=[SourceSpec("text", 0.3), SourceSpec("text_chat", 0.7)],
        optim=Optim(name="muon", lr=1e-3, momentum=0.9, weight_decay=0.05, schedule="wsd", warmup_steps=20,
                    decay_share=0.4),
        budget=Budget(tokens=1536, visual_tokens=64, packs_per_step=2, steps=300),
        precision="auto", sharding="replicate",
    )  # fmt: skip
