"""Vectors of a teacher for every sample of a folder of shards."""
