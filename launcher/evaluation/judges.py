"""What a set asks of a model, and how the answer is scored, for each kind of set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agff.embedder import Embedder
from data_pipeline.layouts.caption_set import CaptionSet, ReferenceSet
from data_pipeline.layouts.region_set import RegionSet
from data_pipeline.layouts.sugarcrepe import ChoiceSet
from launcher.evaluation.benchmarks import Benchmark, JudgedBenchmark
from launcher.evaluation.caption_quality import captions_of, check_writes_captions, score_quality
from launcher.evaluation.caption_scores import score_captions, score_choices
from launcher.evaluation.judged import JudgedScore
from launcher.evaluation.region_scores import check_embeds_regions, encode_region_set, score_regions
from launcher.evaluation.scores import Encodes, encode_used


def check_model(model: Embedder, benchmarks: Sequence[Benchmark]) -> None:
    """Raise ConfigError for a set that asks what this model cannot do."""
    for benchmark in benchmarks:
        if isinstance(benchmark, ReferenceSet):
            check_writes_captions(model)
        elif isinstance(benchmark, RegionSet):
            check_embeds_regions(model)


def model_says(model: Embedder, benchmark: Benchmark, encode: Encodes) -> tuple[Any, dict[int, str]]:
    """(captions, vectors of regions, or (N, M, D) embeddings, as the score of such a set takes them;
    {item: why it has none}); the same on every rank. Collective."""
    if isinstance(benchmark, ReferenceSet):
        return captions_of(model, benchmark)
    if isinstance(benchmark, RegionSet):
        return encode_region_set(model, benchmark, encode)
    return encode_used(encode, benchmark)


def score_judged(model: Embedder, benchmark: JudgedBenchmark, said: Any) -> tuple[str, Sequence[JudgedScore]]:
    """(kind, one of `judged.KINDS`; the scores)."""
    match benchmark:
        case CaptionSet():
            return "captions", score_captions(model, benchmark, said)
        case ChoiceSet():
            return "choices", score_choices(model, benchmark, said)
        case RegionSet():
            return "regions", score_regions(model, benchmark, said)
        case ReferenceSet():
            return "caption_quality", [score_quality(benchmark, said)]
