"""`python -m tests.benchmarks.report [JSON]`: what was measured, into the READMEs between their markers.

With JSON, the file that `make bench` wrote, that becomes tests/benchmarks/measured.json first: the one result
that is committed. README.md has a line for each measurement of the step, tests/README.md every row.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.table import Measured

MEASURED = Path(__file__).with_name("measured.json")
ROOT = Path(__file__).parents[2]
OF_THE_STEP = ("step", "peers", "before", "loss", "flops")
PART = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)", re.DOTALL)


def texts(measured: Measured) -> dict[Path, str]:
    """README -> what is between its markers."""
    return {
        ROOT / "README.md": measured.summary(OF_THE_STEP),
        ROOT / "tests/README.md": measured.markdown(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", help="of `make bench`; default: the committed one")
    arguments = parser.parse_args(argv)
    if arguments.json:
        shutil.copyfile(arguments.json, MEASURED)
    return write_parts(texts(Measured.read(MEASURED)), PART)


def write_parts(texts: Mapping[Path, str], part: re.Pattern[str]) -> int:
    """Put each text where its file has that part; returns the exit code."""
    for readme, text in texts.items():
        before = readme.read_text(encoding="utf-8")
        if len(part.findall(before)) != 1:
            sys.stderr.write(f"{readme}: one part like {part.pattern} is expected\n")
            return 2
        readme.write_text(part.sub(lambda _, text=text: text, before), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
