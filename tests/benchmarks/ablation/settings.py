"""What is trained: the settings, by the question that they answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

DIM = 16
LLAVE_WEIGHT = 9.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train. Its defaults are the method's, without EGA."""

    num_fine: int = 4
    dim: int = DIM
    beta: float = 0.05
    temperature: float = 0.05
    amplification: float = 0.0
    """EGA's; 0 is plain InfoNCE."""
    hardness_weight: float = 0.0
    """LLaVE's: logits of negatives get this much times their similarity, without gradient."""
    outer_beta: float | None = None
    """Softness across the four patterns, where it is not `beta`."""
    aligned: bool = False
    """Fine vector m meets fine vector m of the other side alone."""
    global_weight: float = 0.25
    """Of the global pattern; the other three share the rest."""
    nested_global: float = 0.0
    """Weight of a second loss, on the global vectors alone."""
    learning_rate: float = 3e-3
    num_steps: int = 350
    num_scenes: int = 64
    """Of a batch, which has as many edits beside them."""
    num_judged: int = 256
    """Scenes of each test."""


INFO_NCE = Setting(num_fine=0)
AGFF = Setting()
WIDE = Setting(num_fine=0, dim=5 * DIM)
"""One vector of as many floats as AGFF's five."""
EGA = 1.0

FACTORS = {
    "InfoNCE": INFO_NCE,
    "InfoNCE + EGA": replace(INFO_NCE, amplification=EGA),
    "one vector of 5 D": WIDE,
    "one vector of 5 D + EGA": replace(WIDE, amplification=EGA),
    "AGFF": AGFF,
    "AGFF + EGA": replace(AGFF, amplification=EGA),
}
"""Five seeds each, all at tau 0.05."""


def _of_one_vector(setting: Setting) -> dict[str, Setting]:
    """Nine settings, as many as the method's."""
    taus = {f"tau {tau}": replace(setting, temperature=tau) for tau in (0.02, 0.03, 0.07, 0.1, 0.15)}
    rates = {f"learning rate {rate}": replace(setting, learning_rate=rate) for rate in (1.5e-3, 5e-3, 8e-3)}
    return {"default": setting, **taus, **rates}


TUNED = {
    "InfoNCE": _of_one_vector(INFO_NCE),
    "one vector of 5 D": _of_one_vector(WIDE),
    "AGFF": {
        "default": AGFF,
        **{f"beta {beta}": replace(AGFF, beta=beta) for beta in (0.02, 0.1, 0.2)},
        **{f"K {count}": replace(AGFF, num_fine=count) for count in (1, 2, 8)},
        **{f"tau {tau}": replace(AGFF, temperature=tau) for tau in (0.02, 0.1)},
    },
}
"""Three seeds each, equally many tries a family; the best on the validation split is then trained on five."""

VARIANTS = {
    "InfoNCE, LLaVE's weights": replace(INFO_NCE, hardness_weight=LLAVE_WEIGHT),
    "AGFF, LLaVE's weights": replace(AGFF, hardness_weight=LLAVE_WEIGHT),
    "AGFF, hard max (beta 0.002)": replace(AGFF, beta=0.002),
    "AGFF, fine-fine aligned by index": replace(AGFF, aligned=True),
    "AGFF, beta 0.2 across patterns": replace(AGFF, outer_beta=0.2),
    "AGFF, half of the weight on global-global": replace(AGFF, global_weight=0.5),
    "AGFF, and a loss on the global vectors": replace(AGFF, nested_global=1.0),
    "AGFF, beta 0.1, and a loss on the global vectors": replace(AGFF, beta=0.1, nested_global=1.0),
}
"""Three seeds each. The last four look for one that keeps full captions and the naming of one object."""
