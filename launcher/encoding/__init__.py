"""Items -> vectors, shared out over ranks, loaded by worker processes, kept in a cache."""
