"""What `make bench` compares computes what it says, and the READMEs hold what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.bench import GROUPS, main
from tests.benchmarks.peer import accumulate
from tests.benchmarks.report import MEASURED, PART, texts
from tests.benchmarks.steps import LARGEST_WHOLE, NUM_CHUNKS, BareLoop, Setting, engine_of
from tests.benchmarks.synthetic import write_backbone
from tests.benchmarks.table import Measured, Row
from tests.benchmarks.turns import Contender, Ratio, take_turns
from tests.ranks import run_ranks


class Projection(nn.Module):
    """Stands in for a backbone, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 4).double()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(self.linear(inputs["rows"]), dim=-1)


def sides() -> tuple[Tensor, Tensor]:
    rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)).double()
    return rows[:8], rows[8:]


def gradient_of_the_public_step() -> Tensor:
    own = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    model = DistributedDataParallel(Projection())
    queries, targets = ([{"rows": part} for part in side[own].split(2)] for side in sides())
    accumulate(model, queries, targets)
    return model.module.linear.weight.grad


def gradient_norms_of_ours_and_the_bare_loop(folder: Path) -> list[tuple[float, float]]:
    """Of the first step, for each number of chunks."""
    from agff.step import train_step

    norms = []
    for num_chunks in NUM_CHUNKS.values():
        setting = Setting(folder=folder, num_pairs=8)
        run = setting.run(1, num_chunks)
        batch = setting.batch(run)
        assert len(batch.chunks) == num_chunks
        engine, bare = engine_of(run), BareLoop(run)
        bare.model.load_state_dict(engine.model.state_dict())
        train_step(engine, run.config.loss, run.config.fusion, batch)
        bare.accumulate(batch)
        norm = nn.utils.get_total_norm([p.grad for p in bare.trained])
        norms.append((engine.gradient_norm, float(norm)))
    return norms


def both(folder: Path) -> tuple[Tensor, list[tuple[float, float]]]:
    return gradient_of_the_public_step(), gradient_norms_of_ours_and_the_bare_loop(folder)


def test_all_contenders_compute_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    found, norms = run_ranks(both, write_backbone(tmp_path, quick=True), world_size=2)[0]
    model = Projection()
    query, target = (model({"rows": side}) for side in sides())
    nn.functional.cross_entropy(query @ target.T / 0.02, torch.arange(8)).backward()
    torch.testing.assert_close(found, model.linear.weight.grad, rtol=1e-10, atol=1e-12)
    for ours, bare in norms:
        assert ours == pytest.approx(bare, rel=1e-4)  # float32
    assert norms[0] == pytest.approx(norms[1], rel=1e-4), "chunks change nothing"


def test_a_ratio_is_taken_round_by_round() -> None:
    ratio = Ratio.of([2.0, 30.0, 4.0, 8.0], [1.0, 10.0, 4.0, 4.0])  # 2, 3, 1, 2
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def idle_cases(name: str) -> dict[str, object]:
    return {"a": lambda: None, "b": lambda: None} if name == "two" else {"a": lambda: None}


def broken_cases() -> dict[str, object]:
    raise ValueError("no such model")


def test_contenders_take_turns_in_processes_of_their_own() -> None:
    contenders = [
        Contender(name=name, make=idle_cases, arguments=(name,), num_ranks=1) for name in ("one", "two")
    ]
    times = take_turns(contenders, rounds=3, repeats=2)
    assert {key: len(value) for key, value in times.items()} == {
        ("one", "a"): 3,
        ("two", "a"): 3,
        ("two", "b"): 3,
    }
    broken = Contender(name="broken", make=broken_cases, arguments=(), num_ranks=1)
    with pytest.raises(RuntimeError, match="no such model"):
        take_turns([broken], rounds=1, repeats=1)


def row(case: str, ratio: float) -> Row:
    return Row(group="g", what="step", case=case, against="loop", quantity="time", ratio=ratio)


def test_a_table_is_read_back_and_its_cases_are_one_line_of_the_summary(tmp_path: Path) -> None:
    measured = Measured.here([row("ZeRO-1", 1.0), row("ZeRO-3", 1.234)])
    measured.write(tmp_path)
    assert Measured.read(tmp_path / "measured.json") == measured
    assert (tmp_path / "measured.md").read_text().splitlines()[-1].count("counted") == 1
    assert measured.summary(["g"]).splitlines()[-1] == "| step / loop | time | ZeRO-1 1.00; ZeRO-3 1.23 |"


def test_the_readmes_hold_what_was_measured() -> None:
    """Otherwise: python -m tests.benchmarks.report"""
    for readme, text in texts(Measured.read(MEASURED)).items():
        assert PART.findall(readme.read_text()) == [text], readme


def test_zero3_is_measured_with_every_matrix_partitioned(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path, quick=False)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = weights.keys()
        shapes = [weights.get_slice(name).get_shape() for name in names]
    assert all((math.prod(shape) > LARGEST_WHOLE) == (len(shape) > 1) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_quick_bench_runs(group: str, tmp_path: Path) -> None:
    assert main(["--quick", "--only", group, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "measured.json").read_text())["rows"]
    assert rows
    assert all(row["ratio"] > 0 for row in rows)
