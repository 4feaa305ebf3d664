"""The rule of findings, and what the tests of the checks ask of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launcher.checks.finding import Finding, State


def states(findings: Sequence[Finding]) -> list[State]:
    return [finding.state for finding in findings]


def only(findings: Sequence[Finding]) -> Finding:
    """The one finding that is not ok."""
    wrong = [finding for finding in findings if finding.state != "ok"]
    assert len(wrong) == 1, findings
    return wrong[0]


@pytest.mark.parametrize(("state", "remedy"), [("error", ""), ("warning", ""), ("ok", "pip install it")])
def test_every_fault_has_a_remedy_and_nothing_else_has(state: State, remedy: str) -> None:
    with pytest.raises(ValueError, match="remedy"):
        Finding(state, "MPI", "found", remedy)
