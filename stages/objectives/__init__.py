"""What a stage trains towards. A new objective is a file here and a line in `OBJECTIVES`."""

from mm.common.config import nearest
from mm.common.errors import UserError
from stages.objectives.contrastive import Contrastive
from stages.objectives.next_token import NextToken, ToldNextToken
from stages.objectives.objective import Objective
from stages.objectives.told_features import ToldFeatures
from stages.objectives.words import Words
from stages.stage import ObjectiveSpec

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken, "told": ToldNextToken, "contrastive": Contrastive, "words": Words,
    "told_features": ToldFeatures,
}  # fmt: skip


def make(spec: ObjectiveSpec) -> Objective:
    """The objective a stage names. Raises UserError for an unknown name or option."""
    if spec.name not in OBJECTIVES:
        raise UserError(f"objective.name={spec.name!r} is not known{nearest(spec.name, OBJECTIVES)}")
    try:
        return OBJECTIVES[spec.name](**spec.options)
    except TypeError as e:
        raise UserError(f"objective.options of {spec.name}: {e}") from e
