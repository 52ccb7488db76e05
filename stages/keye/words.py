"""Preparatory stage, tiny only: a tower that knows the world's words at each place of a picture.

    mm run keye.words --size tiny                                    2 cores without bf16, 12 minutes

At small and 8b this stage does not exist: the tower is a local SigLIP folder (`--siglip FOLDER`), which has seen
billions of pictures. Here it is trained from nothing on the world's `regions` and `tracks`: pictures and clips whose
answer names each thing, where it is and, in a clip, what it does, and each letter of a sign, in the published
grounding format. Every patch of a region tells the words of its name from their rivals (`data_mix/regions.py:
Names`), and the places of its box from all places of its frame; what lies in no region says no word. So a picture
teaches at a hundred places and not at one (`benchmarks/tower.py` sets it against s0_vit alone), and the tower keeps
where things are, which no word needs. Places are learnt at once (docs/benchmarks.md, "What teaches a tower"), that
silence too (the stage's log), so they weigh little, by single trials. Frames of clips are shown smaller than in later
stages, so that there are more of them; the shapes that a tower has learnt of them it still knows when they are larger
(after FixRes, Touvron et al. 2019, arXiv 1906.06423: train small, test large).
"""

from dataclasses import replace

from data_mix.mix import SourceSpec
from mm.sizes import PROCESSORS, SIZES
from stages.keye.s0_vit import TEXTS, Towers
from stages.stage import Budget, ObjectiveSpec, Optim, Stage


def stage(size: str) -> Stage:
    return Stage(
        name="keye.words", size=size, doc=__doc__,
        model=Towers(SIZES[size].vision, TEXTS[size]),
        start=["scratch"],
        train={"vision_model.*": 1.0, "vision_model.head.*": 0.0, "text_model.embeddings.token_embedding.*": 1.0},
        mix=[SourceSpec("regions", 0.62, "samples"), SourceSpec("tracks", 0.38, "samples")],
        processor=replace(PROCESSORS[size], frame_max_tokens=25, video_max_tokens=200),
        objective=ObjectiveSpec("words", {"silence": 0.25, "places": 0.1}),
        optim=Optim(name="muon", lr=8e-3, momentum=0.9, weight_decay=0.05, schedule="cosine", warmup_steps=20,
                    min_lr_ratio=0.05),
        budget=Budget(tokens=1536, visual_tokens=512, packs_per_step=2, steps=1400),
        precision="auto", sharding="replicate",
    )  # fmt: skip
