"""Which settings of a run may change when it is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAY_CHANGE_ON_RESUME = (
    "run_dir",
    "deepspeed",  # the file's name; its content is compared key by key
    "save_every",
    "keep_last",
    "keep_every",
    "validate_every",
    "keep_best",
    "validation.mmeb_eval",
    "validation.mmeb_images",
    "validation.mmvp",
    "validation.captions",
    "validation.caption_images",
    "validation.shards",
    "validation.sources",
    "validation.vectors",
    "validation.max_queries",
    "max_skipped_in_a_row",
    "loss_spike_deviations",
    "collective_timeout_s",
    "stalled_step_s",
    "log_every",
    "log_samples",
    "cpu_ranks",
    "batch.keep_vision",
    "batch.first_pass_chunks",
    "data.num_workers",
    "data.check_hashes",
    "data.max_bad_in_a_row",
    "data.stalled_after_s",
    "data.accept_changes",
    "data.cache.dir",
    "data.cache.max_gib",
    "data.cache.fetch_ahead_steps",
)
"""Settings that leave the mathematics of a run as it is. Any other setting is refused when it changed."""
FOLLOW_FROM_OTHERS = (
    "deepspeed.train_batch_size",
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.zero_optimization.reduce_bucket_size",
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold",
)
"""Filled in from the global batch and the number of ranks, which are compared themselves, or sizes of
transfers, filled in from the model where they are absent."""
BEFORE_IT_WAS_STORED: Mapping[str, Any] = {
    "objective": "contrastive",
    "backbone.text_only": False,
    "validation": {},
}
"""What a setting was in runs that do not store it."""
DECIDE_THE_ORDER = (
    "seed",
    "batch.global_batch_size",
    "data.shards",
    "data.vectors",
    "data.weights",
    "data.caps",
    "data.sub_batch_size",
)
"""Settings of which the plan says more exactly whether and how it changed
(data_pipeline/plan_changes.py)."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each setting that differs and changes the mathematics of a run, the order of data
    aside."""
    found = []
    for key in sorted({*old, *new}):
        name, after = prefix + key, new.get(key)
        before = old.get(key, BEFORE_IT_WAS_STORED.get(name))
        if name in (*MAY_CHANGE_ON_RESUME, *DECIDE_THE_ORDER, *FOLLOW_FROM_OTHERS) or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        else:
            found.append(f"{name}: {before if key in old else 'not stored'} -> {after}")
    return found
