"""How fast a step and the objective are at real widths (where it runs: conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.quickstart.backbone import BackboneSizes
from tests.benchmarks.fused_loss import Size, loss_rows
from tests.gpu.findings import Findings
from tests.gpu.speeds import QWEN2_VL_2B, QWEN2_VL_7B, load_of, speed_of_a_step
from tests.gpu.where import Where

pytestmark = pytest.mark.timeout(3600)


@pytest.mark.parametrize(("name", "sizes"), [("Qwen2-VL-2B", QWEN2_VL_2B), ("Qwen2-VL-7B", QWEN2_VL_7B)])
def test_a_step_at_real_widths(
    where: Where, findings: Findings, tmp_path: Path, name: str, sizes: BackboneSizes
) -> None:
    values = where.run(speed_of_a_step, load_of(sizes, on_gpus=where.on_gpus), tmp_path / "backbone")
    shown = [
        (label, values[f"speed/{key}"], unit)
        for label, key, unit in (
            ("", "samples_per_s", "pairs/s"),
            ("MFU", "mfu_percent", "%"),
            ("HFU", "hfu_percent", "%"),
            ("executed / useful", "executed_per_useful", ""),
            ("peak", "peak_memory_gib", "GiB"),
        )
        if f"speed/{key}" in values
    ]
    findings.note(
        f"{name}, LoRA, ZeRO-2, bf16",
        ", ".join(f"{label} {value:.2f} {unit}".strip() for label, value, unit in shown),
    )
    assert values["speed/samples_per_s"] > 0
    assert values["speed/executed_per_useful"] > 1


def test_the_loss_at_32768_candidates(where: Where, findings: Findings) -> None:
    rows, candidates, dim, repeats = (256, 32_768, 1536, 9) if where.on_gpus else (4, 16, 8, 2)
    size = Size(rows=rows, candidates=candidates, k=4, dim=dim, device=where.device, threads=1)
    (found,) = loss_rows([size], repeats=repeats)
    findings.note(
        f"loss and gradients, {rows} x {candidates:,}, K = 4, D = {dim:,}",
        f"{found['ratio']:.2f} of its three products, {1e3 * found['ours_s']:.1f} ms, "
        f"{found['ours_peak_bytes'] / 2**20:,.0f} MiB beyond the inputs",
    )
    assert found["ratio"] > 0
