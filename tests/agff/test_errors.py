"""An error lists its findings."""

from __future__ import annotations

import pytest

from agff.errors import MOST_LISTED, listed


@pytest.mark.parametrize("count", [2, 10, MOST_LISTED])
def test_each_finding_is_a_line(count: int) -> None:
    findings = [f"shard {index} is missing" for index in range(count)]
    text = listed(f"{count} files are missing", findings, see_all="verify.py DIR")
    first, *lines = text.splitlines()
    assert first == f"{count} files are missing:"
    assert [line.strip() for line in lines] == findings


def test_a_single_finding_is_the_whole_text() -> None:
    assert (
        listed("1 file is missing", ["shard 3 is missing"], see_all="verify.py DIR") == "shard 3 is missing"
    )


def test_what_is_not_listed_is_counted_with_the_command_that_lists_it() -> None:
    findings = [f"shard {index} is missing" for index in range(MOST_LISTED + 7)]
    lines = listed("57 files are missing", findings, see_all="verify.py DIR").splitlines()
    assert len(lines) == 1 + MOST_LISTED + 1
    assert lines[-1].strip() == "and 7 more; verify.py DIR lists all"


def test_without_such_a_command_all_are_listed() -> None:
    findings = [f"setting {index} is unknown" for index in range(MOST_LISTED + 7)]
    assert len(listed("57 problems", findings).splitlines()) == 1 + len(findings)
