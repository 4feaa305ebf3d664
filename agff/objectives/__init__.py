"""One file per training objective of the family, and their names in a recipe."""

from agff.objectives.contrastive import Contrastive
from agff.objectives.distillation import Distillation
from agff.objectives.mac import Mac
from agff.objectives.mm_gem import MmGem
from agff.objectives.objective import Objective
from agff.objectives.vein import Vein

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "distillation": Distillation,
    "mac": Mac,
    "mm_gem": MmGem,
    "vein": Vein,
}
"""By the recipe's `objective`."""


def name_of(objective: Objective) -> str:
    """Its key in OBJECTIVES."""
    return next(name for name, cls in OBJECTIVES.items() if cls is type(objective))
