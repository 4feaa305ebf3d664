"""Real images, a small backbone and shards for a first run."""

from pathlib import Path

DEFAULT_OUT = Path(".cache/quickstart")
"""Where the quickstart's data lie, below the working folder."""
