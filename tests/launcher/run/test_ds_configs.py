"""The files in ds_configs/: each is understood by DeepSpeed, and trains where a CPU can run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launcher.command_line import parse_train_arguments
from launcher.run.config import resolve
from launcher.run.deepspeed_json import read_deepspeed_json
from tests.launcher.runs import REPOSITORY, run_command
from tests.ranks import run_ranks

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
    assert json.loads((REPOSITORY / "ds_configs/zeropp.json").read_text())["zero_optimization"][
        "zero_quantized_weights"
    ]


class OneLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 16, bias=False).bfloat16()

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(inputs["values"])


NUM_CHUNKS = 128


def gradient_errors() -> dict[str, float]:
    """By DeepSpeed file: how far the sum of many chunks' bf16 gradients is off, of its norm, as it reaches
    the optimizer."""
    from deepspeed.utils import safe_get_full_grad

    from agff.engine import Engine, start_process_group
    from launcher.run.hardware import Hardware

    device = start_process_group(0)
    hardware = Hardware(has_gpu=True, gpu_has_bf16=True, cpu_has_bf16=False)
    config = parse_train_arguments([]).config
    torch.manual_seed(0)
    inputs = (torch.randn(NUM_CHUNKS, 8, 32) + 0.3).bfloat16()
    weights = (torch.randn(NUM_CHUNKS, 8, 16) + 0.3).bfloat16()
    expected = torch.einsum("nbo,nbi->oi", weights.double(), inputs.double())
    errors = {}
    for name in ("zero2", "zero3"):
        values = read_deepspeed_json(REPOSITORY / f"ds_configs/{name}.json")
        run = resolve(config, values, deepspeed_name=name, world_size=1, hardware=hardware)
        engine = Engine(
            OneLayer(),
            deepspeed_config=run.deepspeed,
            optimizer=config.optimizer,
            num_steps=9,
            autocast_dtype=run.autocast_dtype,
            device=device,
        )
        for index in range(NUM_CHUNKS):
            loss = (engine.encode({"values": inputs[index]}).float() * weights[index]).sum()
            engine.backward(loss, index == NUM_CHUNKS - 1)
        found = safe_get_full_grad(engine.model.layer.weight).double()
        errors[name] = float((found - expected).norm() / expected.norm())
    return errors


def test_gradients_of_many_bf16_chunks_are_summed_in_float32() -> None:
    # summed in bf16: 1e-2
    assert all(error < 1e-3 for error in run_ranks(gradient_errors, world_size=1)[0].values())


@pytest.mark.timeout(300)
def test_offload_trains(project: Path) -> None:
    result = run_command(
        "deepspeed launcher/train.py --deepspeed ds_configs/zero3_offload.json --num_steps 2",
        project,
        timeout_s=280,
    )
    assert result.returncode == 0, result.stdout
    assert (project / "runs/quickstart-zero3_offload/checkpoints/step-000002/state.json").exists()
