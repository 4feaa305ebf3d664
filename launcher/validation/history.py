"""validation.json of a run folder: what was scored at which step, and so which checkpoint is the best.

{keep_best, best_step, validations: [{step, sets, scores: {name: number}}]}; `sets` is a fingerprint of what
was asked, so that scores of other sets are not compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agff.checkpoint_folder import complete_steps
from agff.errors import CheckpointError
from agff.files import write_text
from launcher.run.config import ResolvedRun
from launcher.run.meeting import from_first_rank
from launcher.validation.scores import is_better
from launcher.validation.sets import ValidationSets

HISTORY_FILE = "validation.json"


class History:
    """The validations of a run up to its current step; the same on every rank, rank 0 writes them."""

    def __init__(
        self, run: Path, sets: ValidationSets, *, keep_best: str | None, validations: list[dict[str, Any]]
    ) -> None:
        """sets: what is asked from now on."""
        self.sets = sets
        self._run, self._fingerprint, self._keep_best = run, sets.fingerprint, keep_best
        self._validations = validations

    def has(self, step: int) -> bool:
        """Whether that step was scored on these sets."""
        return any((each["step"], each["sets"]) == (step, self._fingerprint) for each in self._validations)

    def record(self, step: int, scores: Mapping[str, float]) -> None:
        """Note a step's scores, in place of those of the same step; rank 0 writes them. Collective. Raises
        StorageError on every rank when they cannot be written."""
        others = [each for each in self._validations if each["step"] != step]
        self._validations = [*others, {"step": step, "sets": self._fingerprint, "scores": dict(scores)}]
        from_first_rank(self._write)

    def _write(self) -> None:
        values = {
            "keep_best": self._keep_best,
            "best_step": self.best_step(),
            "validations": self._validations,
        }
        write_text(self._run / HISTORY_FILE, json.dumps(values, indent=1) + "\n")

    def best_step(self) -> int | None:
        """The step with the best score of those whose checkpoint is there, of equal ones the first; None
        without `keep_best`, or as long as there is none."""
        name = self._keep_best
        if name is None:
            return None
        there, best, best_score = set(complete_steps(self._run)), None, math.nan
        for each in sorted(self._validations, key=lambda each: each["step"]):
            score = each["scores"].get(name, math.nan)
            if each["sets"] != self._fingerprint or each["step"] not in there or not math.isfinite(score):
                continue
            if best is None or is_better(name, score, best_score):
                best, best_score = each["step"], score
        return best


def open_history(run: ResolvedRun, sets: ValidationSets | None, *, start_step: int) -> History | None:
    """What was scored up to the step at which the run goes on; later scores are of steps that it went back
    from. None where there is no validation. Collective: rank 0 reads.

    Raises CheckpointError on every rank for a file that is not ours.
    """
    if sets is None:
        return None
    found = from_first_rank(lambda: _read(run.run_dir / HISTORY_FILE))
    return History(
        run.run_dir,
        sets,
        keep_best=run.config.keep_best,
        validations=[each for each in found if each["step"] <= start_step],
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        validations = json.loads(path.read_text(encoding="utf-8"))["validations"]
        return [
            {
                "step": int(each["step"]),
                "sets": str(each["sets"]),
                "scores": {str(name): float(score) for name, score in each["scores"].items()},
            }
            for each in validations
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not what this program writes: {error!r}; restore it from a copy, or remove it: then "
            "the scores of before are forgotten"
        ) from None
