"""What the log says of ZeRO-3's all-gathers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.zero import partition_parameters

from agff.zero3 import Gathers, counted_gathers
from launcher.run.parameter_gathers import with_gathers_logged

GATHER = "_dist_allgather_fn"


def log_of(found: Gathers, gathered: int, capsys: pytest.CaptureFixture[str]) -> str:
    """After three steps, each of which gathers twice as much as the one before."""
    observe = with_gathers_logged(lambda report: None, found)
    for step in (1, 2, 3):
        found.count += gathered * 2**step
        found.num_bytes += gathered * 2**step * 2**20
        report: Any = SimpleNamespace(step=step)
        observe(report)
    return capsys.readouterr().out


def test_the_second_step_s_gathers_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert log_of(Gathers(), 10, capsys) == "parameter gathers in step 2: 40 all-gathers, 40.0 MiB\n"


@pytest.mark.parametrize(
    ("stage", "expected"), [(2, ""), (3, "parameter gathers: not counted by this DeepSpeed\n")]
)
def test_a_deepspeed_that_gathers_in_another_way_is_survived(
    stage: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(partition_parameters, GATHER)
    found = Gathers()
    with counted_gathers({"zero_optimization": {"stage": stage}}, found):
        assert not hasattr(partition_parameters, GATHER)
    assert found.is_counted == (stage == 2)
    assert log_of(found, 0, capsys) == expected


def test_nothing_is_put_in_the_place_of_deepspeed_s_function_below_zero_3() -> None:
    gather = getattr(partition_parameters, GATHER)
    for stage in (1, 2, 3):
        with counted_gathers({"zero_optimization": {"stage": stage}}, Gathers()):
            assert (getattr(partition_parameters, GATHER) is gather) == (stage < 3)
        assert getattr(partition_parameters, GATHER) is gather
