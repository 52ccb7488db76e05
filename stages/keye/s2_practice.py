"""Between stages 2 and 3, at tiny only and ours: tasks that compare pictures or frames are practised by themselves.

    mm run keye.s2_practice --size tiny --scale 4                    2 cores, 4 minutes

Not published; at small and 8b, and in runs shorter than --scale 2, stage 3 follows stage 2: what comparing builds on
must be there first. A tiny model has few tokens a step, and what it takes to compare (is it the same product? the
same topic? which comes first? which way does it slide?) drowned in every mix of everything that was tried. So these
are asked with little else around, in the words of the tasks they prepare for, of training's pictures; rude comments
and likes come along, lest they be forgotten. The rest is to come back in stage 3. All else is as in stage 2
(as that is now: the shares here were tried with a stage 2 of twice the rate).
"""

from dataclasses import replace

from data_mix.mix import SourceSpec
from stages.keye import s2_multitask
from stages.stage import Stage

MIX = {
    "shop_spu": 0.24, "shop_video_topic": 0.27, "shop_video_order": 0.2, "motion": 0.17, "shop_porncomment": 0.07,
    "shop_high_like": 0.05,
}  # fmt: skip


def stage(size: str) -> Stage:
    s2 = s2_multitask.stage(size)
    return replace(
        s2, name="keye.s2_practice", doc=__doc__, start=["s2_multitask"],
        mix=[SourceSpec(name, weight) for name, weight in MIX.items()],
        budget=replace(s2.budget, steps=110),
    )  # fmt: skip
