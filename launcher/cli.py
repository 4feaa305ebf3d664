"""`agff VERB ...`: the same programs as `python launcher/<verb>.py`, under one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "train": ("launcher.train", "run a recipe, or continue an interrupted run"),
    "prepare": ("launcher.prepare", "MMEB-train download -> WebDataset shards"),
    "verify": (
        "launcher.verify",
        "is every shard, index and sample as it was written? Is a download complete?",
    ),
    "preview": ("launcher.preview", "an HTML page of a run's batches"),
    "doctor": ("launcher.doctor", "will this machine train? Findings with their remedies"),
    "evaluate": ("launcher.evaluate", "score a run or release on public layouts and your own sets"),
    "convert": ("launcher.convert_checkpoint", "ZeRO checkpoint -> release folder"),
    "embed": ("launcher.embed", "vectors of a corpus for search, or a teacher's for distillation"),
    "mine": ("launcher.mine", "hard negatives for MMEB-train, found by a release"),
    "search": ("launcher.search", "index vectors and find the items that fit a text or an image"),
    "quickstart-data": ("launcher.quickstart_data", "real images and a small backbone for a first run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the verb."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in VERBS:
        lines = "\n".join(f"  agff {verb:<16} {about}" for verb, (_, about) in VERBS.items())
        wanted_help = argv[:1] in ([], ["-h"], ["--help"])
        if not wanted_help:
            sys.stderr.write(f"error: {argv[0]}: no such verb\n")
        (sys.stdout if wanted_help else sys.stderr).write(
            f"usage: agff VERB ...; agff VERB --help has the options\n{lines}\n"
        )
        return 0 if wanted_help else 2
    module, _ = VERBS[argv[0]]
    return importlib.import_module(module).main(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
