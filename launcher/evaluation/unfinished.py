"""Which sets an evaluation has scored, so that the same command continues where it was stopped.

Beside scores.json, while an evaluation runs, and after it was killed or failed:

    .scores.json.<hash>.unfinished      a line for each set that is scored: the hash of the set as it was read

The hash in the name is that of weights, settings and sets, so another evaluation never continues this one. An
evaluation that ends well removes the file: the same command then scores everything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agff.errors import ConfigError
from agff.files import locked
from launcher.evaluation.benchmarks import Benchmark, content_hash

OUTLIVED_S = 10
"""The processes that load items for a process that was killed notice it within five seconds and hold its
lock till then."""


class Unfinished:
    """The file of one evaluation; rank 0 alone uses it. OSErrors are the caller's."""

    def __init__(
        self, out: Path, benchmarks: Sequence[Benchmark], *, weights_sha256: str, settings: Mapping[str, Any]
    ) -> None:
        self._hashes = {(type(each), each.name): content_hash(each) for each in benchmarks}
        what = [weights_sha256, json.dumps(settings, sort_keys=True), *self._hashes.values()]
        name = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
        self.path = out.with_name(f".{out.name}.{name}.unfinished")
        self._out = out

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else makes the same evaluation meanwhile. Raises ConfigError when somebody does."""
        deadline = time.monotonic() + OUTLIVED_S
        while True:
            with locked(self.path, wait=False) as is_mine:
                if is_mine:
                    yield
                    return
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self._out}: another process scores these sets with these weights into this file now; "
                    "wait for it, or name another file (--out)"
                )
            time.sleep(0.5)

    def has(self, benchmark: Benchmark) -> bool:
        """Whether the set was scored before the evaluation was stopped."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:  # another process has finished it in this moment
            return False
        return self._hashes[type(benchmark), benchmark.name] in lines

    def add(self, benchmark: Benchmark) -> None:
        """The scores of this set are written."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{self._hashes[type(benchmark), benchmark.name]}\n")  # behind half a line

    def finish(self) -> None:
        """All sets are scored."""
        self.path.unlink(missing_ok=True)
