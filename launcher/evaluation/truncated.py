"""What a set scores with shorter embeddings, cut from one encoding: those that the model was trained for, and
the global vector alone, which shows what the fine ones bring.

In scores.json [{dim, num_fine, scores: {name: score}}], whole items first; [] of a model of one vector that
was trained for whole items only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
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
    """One set's scores with each truncation, whole items first. Empty where there is but one, and for a set
    that asks for regions or captions."""
    if not isinstance(benchmark, EvalSet | MmvpSet | CaptionSet | ChoiceSet):
        return {}
    return {cut: _numbers(model, benchmark, cut(said)) for cut in _truncations(model, said)}


def _truncations(model: Embedder, items_NMD: Tensor) -> list[Truncation]:
    """Whole items first; none where there are no others."""
    _, num_vectors, width = items_NMD.shape
    whole = Truncation(dim=width, num_fine=num_vectors - 1)
    trained = model.truncations.all(width=width, num_fine=num_vectors - 1)
    there = [cut for cut in trained if cut.num_fine < num_vectors]  # the fine vectors may be left out before
    found = {whole, *there, replace(whole, num_fine=0)}
    return sorted(found, key=lambda cut: (-cut.dim, -cut.num_fine)) if len(found) > 1 else []


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
