"""How often ZeRO-3 gathers parameters in a step: measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tqdm import tqdm

from agff.collectives import rank
from agff.trainer import StepReport
from agff.zero3 import Gathers


def with_gathers_logged(
    observe: Callable[[StepReport], None], gathers: Gathers
) -> Callable[[StepReport], None]:
    """`observe`, and after the second step of this process a line with what that step gathered.

    In the first step DeepSpeed learns the order of modules, and gathers what each rank then keeps.
    gathers: the engine's, which count on.
    """
    so_far: list[Gathers] = []

    def observed(report: StepReport) -> None:
        observe(report)
        if len(so_far) == 2:
            return
        so_far.append(replace(gathers))
        if len(so_far) < 2 or rank() != 0:
            return
        if not gathers.is_counted:
            tqdm.write("parameter gathers: not counted by this DeepSpeed")
        elif gathers.count:
            first, both = so_far
            size = (both.num_bytes - first.num_bytes) / 2**20
            count = both.count - first.count
            tqdm.write(f"parameter gathers in step {report.step}: {count} all-gathers, {size:,.1f} MiB")

    return observed
