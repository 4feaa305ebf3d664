"""`python -m tests.benchmarks.family.report [JSON]`: the family's table into the READMEs, between markers.

With JSON, the file that `make family` wrote, that becomes tests/benchmarks/family/measured.json first: the
one result that is committed.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.family.table import FamilyTable
from tests.benchmarks.report import write_parts

MEASURED = Path(__file__).with_name("measured.json")
ROOT = Path(__file__).parents[3]
PART = re.compile(r"(?<=<!-- family -->\n).*?(?=<!-- end of family -->)", re.DOTALL)


def texts(table: FamilyTable) -> dict[Path, str]:
    """README -> what is between its markers."""
    return {ROOT / "README.md": table.summary(), ROOT / "tests/README.md": table.markdown()}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", help="of `make family`; default: the committed one")
    arguments = parser.parse_args(argv)
    if arguments.json:
        shutil.copyfile(arguments.json, MEASURED)
    return write_parts(texts(FamilyTable.read(MEASURED)), PART)


if __name__ == "__main__":
    raise SystemExit(main())
