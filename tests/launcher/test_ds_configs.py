"""The files in ds_configs/: each is understood by DeepSpeed, and trains where a CPU can run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config import read_deepspeed_json
from tests.launcher.runs import REPOSITORY, run_command

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_known_to_deepspeed(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = read_deepspeed_json(path)
    zero = DeepSpeedZeroConfig(**values["zero_optimization"])  # refuses a key it does not know
    assert int(zero.stage) == values["zero_optimization"]["stage"]
    with pytest.raises(ValueError, match="stage3_prefetch_bucket_sizes"):
        DeepSpeedZeroConfig(**values["zero_optimization"], stage3_prefetch_bucket_sizes=1)
    assert set(values) <= {"zero_optimization", "gradient_clipping", "zero_force_ds_cpu_optimizer"}


def test_each_file_is_explained_beside_them() -> None:
    text = (REPOSITORY / "ds_configs/README.md").read_text()
    assert [path.name for path in FILES if f"| `{path.name}` |" not in text] == []
    assert {path.stem for path in FILES} == {"zero1", "zero2", "zero3", "zero3_offload", "zeropp"}
    assert json.loads((REPOSITORY / "ds_configs/zeropp.json").read_text())["zero_optimization"]["zero_quantized_weights"]


@pytest.mark.timeout(300)
def test_offload_trains(project: Path) -> None:
    result = run_command(
        "deepspeed launcher/train.py --deepspeed ds_configs/zero3_offload.json --num_steps 2", project, timeout_s=280
    )
    assert result.returncode == 0, result.stdout
    assert (project / "runs/quickstart-zero3_offload/checkpoints/step-000002/state.json").exists()
