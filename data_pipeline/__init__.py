"""Shard bytes to batches: no process group, no GPU."""
