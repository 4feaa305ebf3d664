"""The scores of a validation, by name: those of the evaluation, each a number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from agff.embedder import Embedder
from agff.recall import RecallScore
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from data_pipeline.layouts.sugarcrepe import ChoiceSet
from launcher.evaluation.benchmarks import Benchmark
from launcher.evaluation.caption_scores import score_captions, score_choices
from launcher.evaluation.scores import score_mmvp, score_set
from launcher.validation.held_out import DIRECTIONS

LOSS = "held_out/loss"
LOWER_IS_BETTER = (LOSS,)
_KS = (1, 5, 10)
_CAPTION_DIRECTIONS = ("text to image", "image to text")


def score_names(benchmarks: Sequence[Benchmark], held_out_sources: Sequence[str]) -> list[str]:
    """Names of all scores of a validation, the means first."""
    names = ["mmeb"] if any(isinstance(benchmark, EvalSet) for benchmark in benchmarks) else []
    names += ["held_out", LOSS] if held_out_sources else []
    for benchmark in benchmarks:
        names += _names_of(benchmark)
    for source in held_out_sources:
        names += _recall_names(f"held_out/{source}", DIRECTIONS)
    return names


def scores_of(judge: Embedder, benchmark: Benchmark, items_NMD: Tensor) -> dict[str, float]:
    """The scores of one set in percent, from the embeddings of its items; the fused similarity's alone."""
    match benchmark:
        case EvalSet():
            [name] = _names_of(benchmark)
            return {name: score_set(judge, benchmark, items_NMD).score}
        case MmvpSet():
            report = score_mmvp(judge, benchmark, items_NMD)
            patterns = {_mmvp_name(pattern.name): pattern.score for pattern in report.patterns}
            return {"mmvp": report.average.score, **patterns}
        case CaptionSet():
            found = score_captions(judge, benchmark, items_NMD)
            return recall_scores(
                f"captions/{benchmark.name}", [s for s in found if s.similarity == found[0].similarity]
            )
        case ChoiceSet():
            choices = score_choices(judge, benchmark, items_NMD)
            return {
                _choice_name(benchmark, choice.subset): choice.score
                for choice in choices
                if choice.similarity == choices[0].similarity
            }
        case _:
            raise AssertionError(f"{type(benchmark).__name__} is not among what a recipe can name")


def recall_scores(prefix: str, scores: Sequence[RecallScore]) -> dict[str, float]:
    """R@1, R@5 and R@10 of each direction by name."""
    names = _recall_names(prefix, [score.direction for score in scores])
    values = [value for s in scores for value in (s.recall_at_1, s.recall_at_5, s.recall_at_10)]
    return dict(zip(names, values, strict=True))


def means(scores: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """`mmeb`, the unweighted mean of all its sets, and `held_out`, that of R@1 of all sources, query to
    target; each where none of its parts is missing. names: of all scores."""
    parts = {
        "mmeb": [name for name in names if name.startswith("mmeb/")],
        "held_out": [name for name in names if re.fullmatch("held_out/.*/query_to_target_r1", name)],
    }
    return {
        mean: math.fsum(scores[name] for name in of_mean) / len(of_mean)
        for mean, of_mean in parts.items()
        if of_mean and all(name in scores for name in of_mean)
    }


def is_better(name: str, score: float, than: float) -> bool:
    """By more than the rounding of a mean: of equal ones the earlier stays."""
    if math.isclose(score, than, rel_tol=1e-9):
        return False
    return score < than if name in LOWER_IS_BETTER else score > than


def _names_of(benchmark: Benchmark) -> list[str]:
    match benchmark:
        case EvalSet():
            return [_tag(f"mmeb/{benchmark.name}")]
        case MmvpSet():
            return ["mmvp", *dict.fromkeys(_mmvp_name(pair.pattern) for pair in benchmark.pairs)]
        case CaptionSet():
            return _recall_names(f"captions/{benchmark.name}", _CAPTION_DIRECTIONS)
        case ChoiceSet():
            return list(dict.fromkeys(_choice_name(benchmark, choice.subset) for choice in benchmark.choices))
        case _:
            raise AssertionError(f"{type(benchmark).__name__} is not among what a recipe can name")


def _recall_names(prefix: str, directions: Sequence[str]) -> list[str]:
    return [_tag(f"{prefix}/{direction}_r{k}") for direction in directions for k in _KS]


def _mmvp_name(pattern: str) -> str:
    return _tag(f"mmvp/{pattern}")


def _choice_name(benchmark: ChoiceSet, subset: str) -> str:
    return _tag(f"choices/{benchmark.name}/{subset}")


def _tag(name: str) -> str:
    """What TensorBoard makes of a name."""
    return re.sub(r"[^-/\w.]", "_", name)
