"""What the first batches of a run will cost, read from its data before the first step."""

from __future__ import annotations

from agff.errors import AgffError
from agff.processor import ItemProcessor
from data_pipeline.balance import MeasuredBalance, measure_balance
from data_pipeline.reader import ShardReader
from data_pipeline.remote import CachedFolder
from launcher.run.config import ResolvedRun
from launcher.run.data import RunData

LIMIT_S = 2.0
"""Spent on reading, at most."""


def measured_batches(run: ResolvedRun, data: RunData, processor: ItemProcessor) -> dict[str, str]:
    """Rows of the table printed before the first step: name -> value. Reads samples; raises nothing that
    training itself will report better."""
    if isinstance(data.folder, CachedFolder):
        unknown = "not measured: the shards are remote, and nothing is fetched before the run begins"
        return {"padding": unknown, "rank imbalance": unknown, "shards ahead": _shards_ahead(run, data)}
    if run.config.batch.chunk_size == "auto":
        unknown = "not measured: the chunks are found before the first step"
        return {"padding": unknown, "rank imbalance": unknown}
    try:
        measured = measure_balance(
            data.plan,
            ShardReader(data.folder, data.manifest),
            processor,
            run.chunking,
            world_size=run.world_size,
            num_steps=run.config.num_steps,
            with_negatives=run.config.data.with_negatives,
            limit_s=LIMIT_S,
        )
    except AgffError as error:
        unknown = f"not measured: {str(error).splitlines()[0]}"
        return {"padding": unknown, "rank imbalance": unknown}
    if measured is None:
        unknown = f"not measured: the pairs of one step were not read within {LIMIT_S:g} s"
        return {"padding": unknown, "rank imbalance": unknown}
    imbalance = measured.balance.imbalance(zero_stage=run.zero_stage)
    where = _where(measured, run.world_size)
    return {
        "padding": f"{100 * measured.balance.padding_share:.1f} % of the computed tokens ({where})",
        "rank imbalance": f"{imbalance:.2f} x the tokens of a step in which no rank waits for another "
        f"({where}); image encoder not counted",
    }


def _where(measured: MeasuredBalance, world_size: int) -> str:
    steps = "first step" if measured.num_steps == 1 else f"first {measured.num_steps} steps"
    ranks = "" if measured.num_ranks == world_size else f", {measured.num_ranks} of {world_size} ranks"
    return steps + ranks


def _shards_ahead(run: ResolvedRun, data: RunData) -> str:
    """Every machine reads every shard of a step, so its cache must hold those of all steps that are fetched
    ahead."""
    cache = run.config.data.cache
    num_steps = min(run.config.num_steps, 1 + cache.fetch_ahead_steps)
    shards = data.plan.shards(range(num_steps))
    size = sum(data.manifest.sources[name].shards[index].size_bytes for name, index in shards)
    ahead = f"{len(shards)} of {size / 2**30:,.2f} GiB in the first {num_steps} steps, on every machine"
    if size <= cache.max_bytes:
        return ahead
    return (
        f"{ahead}: more than its cache holds, so shards are fetched again; raise data.cache.max_gib="
        f"{cache.max_gib:g} or lower data.cache.fetch_ahead_steps={cache.fetch_ahead_steps}"
    )
