"""What a set scores with shorter embeddings: those that the model was trained for, cut from one encoding.

In scores.json [{dim, num_fine, scores: {name: score}}], whole items first; [] of a model that was trained for
whole items only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

from torch import Tensor

from agff.embedder import Embedder
from agff.nested import Truncation
from data_pipeline.layouts.caption_set import CaptionSet
from data_pipeline.layouts.mmeb_eval import EvalSet
from data_pipeline.layouts.mmvp import MmvpSet
from data_pipeline.layouts.sugarcrepe import ChoiceSet
from launcher.evaluation.benchmarks import Benchmark
from launcher.evaluation.caption_scores import score_captions, score_choices
from launcher.evaluation.scores import score_mmvp, score_set

Truncated: TypeAlias = Mapping[Truncation, Mapping[str, float]]
"""{truncation: {name: score in percent}}."""


def truncated_scores(model: Embedder, benchmark: Benchmark, said: Any) -> Truncated:
    """One set's scores with each truncation, whole items first. Empty where the model was trained for whole
    items only, and for a set that asks for regions or captions."""
    if not isinstance(benchmark, EvalSet | MmvpSet | CaptionSet | ChoiceSet):
        return {}
    _, num_vectors, width = said.shape
    truncations = model.truncations.all(width=width, num_fine=num_vectors - 1)
    return {cut: _numbers(model, benchmark, cut(said)) for cut in truncations}


def _numbers(
    model: Embedder, benchmark: EvalSet | MmvpSet | CaptionSet | ChoiceSet, items_NMD: Tensor
) -> dict[str, float]:
    """Precision@1; MMVP's average; R@1 of both directions and the share of right choices of each subset by
    the fused similarity, which is the global one where no fine vectors are left."""
    similarity = "fused" if items_NMD.shape[1] > 1 else "global"
    match benchmark:
        case EvalSet():
            return {benchmark.name: score_set(model, benchmark, items_NMD).score}
        case MmvpSet():
            return {benchmark.name: score_mmvp(model, benchmark, items_NMD).average.score}
        case CaptionSet():
            return {
                f"{benchmark.name}, {score.direction}": score.recall_at_1
                for score in score_captions(model, benchmark, items_NMD)
                if score.similarity == similarity
            }
        case ChoiceSet():
            return {
                f"{benchmark.name}, {score.subset}": score.score
                for score in score_choices(model, benchmark, items_NMD)
                if score.similarity == similarity
            }


def merged(old: Truncated, new: Truncated) -> Truncated:
    """The new scores, and those of the same truncations by other names."""
    return {truncation: {**old.get(truncation, {}), **scores} for truncation, scores in new.items()}


def truncated_values(truncated: Truncated) -> list[dict[str, Any]]:
    """JSON values."""
    return [{**asdict(truncation), "scores": dict(scores)} for truncation, scores in truncated.items()]


def read_truncated(values: Mapping[str, Any], truncation_of: Callable[..., Any]) -> Truncated:
    """What `truncated_values` wrote. truncation_of: (class, values) -> truncation, checked.

    Raises ValueError, TypeError or KeyError for what `truncated_values` would not write.
    """
    return {
        truncation_of(Truncation, entry): {name: float(score) for name, score in entry["scores"].items()}
        for entry in values.get("truncations", [])  # a file from before these were scored
    }
