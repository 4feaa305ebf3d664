"""Who is compared: a row a method. Another one is another row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

QUICKSTART = Path(".cache/quickstart")
"""Where the drawings, the backbone and the teacher are."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run; a second stage begins with the release of the first."""

    recipe: str
    share: float = 1.0
    """Of the method's pairs; the stages' shares add up to 1."""
    shards: str = "pairs"
    """A key of tasks.SHARDS."""
    is_taught: bool = False
    """Learns from the teacher's vectors of its shards."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Overrides of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    """Of its runs and releases."""
    title: str
    stages: tuple[Stage, ...]
    sets: Mapping[str, Path] = field(default_factory=dict)
    """Options of evaluate.py that only this method can answer."""

    def __post_init__(self) -> None:
        if abs(sum(stage.share for stage in self.stages) - 1) > 1e-9:
            raise ValueError(f"{self.name}: the stages' shares must add up to 1")


METHODS = (
    Method(name="agff", title="AGFF + EGA, K = 4", stages=(Stage(recipe="quickstart"),)),
    Method(
        name="infonce",
        title="InfoNCE, one vector",
        stages=(Stage(recipe="quickstart", settings={"prompts.num_fine": "0", "loss.amplification": "0"}),),
    ),
    Method(
        name="unime",
        title="UniME, distillation then hardest negatives",
        stages=(
            Stage(recipe="quickstart_unime1", share=0.2, shards="texts", is_taught=True),
            Stage(recipe="quickstart_unime2", share=0.8),
        ),
    ),
    Method(
        name="fam",
        title="FAM, MAC then VEIN",
        stages=(
            Stage(recipe="quickstart_fam_align", share=0.5),
            Stage(recipe="quickstart_fam_adapt", share=0.5),
        ),
    ),
    Method(
        name="mm_gem",
        title="MM-GEM, images then regions",
        stages=(
            Stage(recipe="quickstart_mm_gem1", share=0.8),
            Stage(recipe="quickstart_mm_gem2", share=0.2, shards="regions"),
        ),
        sets={
            "regions": QUICKSTART / "family/regions/held_out",
            "caption_quality": QUICKSTART / "family/captions/held_out",
        },
    ),
)
