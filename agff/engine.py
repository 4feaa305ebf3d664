"""The only caller of DeepSpeed engines. It owns the accumulation boundary, the precision and the
optimizer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agff.batch import Encoded, ModelInputs, to_device
from agff.collectives import max_over_ranks
from agff.embedding_model import draws_random_numbers
from agff.errors import ConfigError
from agff.grad_cache import unchanged_random_states
from agff.joined import encode_joined
from agff.kept_vision import FeatureMemory, KeepVision, with_image_features
from agff.optimizer import OptimizerConfig, build_adamw, build_schedule
from agff.zero3 import (
    Gathers,
    check_all_reduced,
    counted_gathers,
    efficient_linear,
    fill_in,
    gather_whole,
    leaving_linear,
)


def start_process_group(local_rank: int, *, timeout_s: float = 1800) -> torch.device:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; return this rank's
    device.

    A collective that takes longer than `timeout_s` fails: the other ranks are gone or hang. A rank that sees
    one device alone takes it, and writes 0 into LOCAL_RANK. Raises ConfigError when the ranks cannot meet.

    Collective. On a CPU no operator is compiled: the shared-memory all-reduce is left out, gloo does its
    work.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        __compatible_ops__["deepspeed_shm_comm"] = False
    elif accelerator.device_count() == 1:
        # Slurm's --gpus-per-task and --gpu-bind show each rank its own device alone
        local_rank = 0
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
            os.environ[name] = "0"  # DeepSpeed takes its device from there
    try:
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(),
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
        )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise ConfigError(_cannot_meet(str(error))) from None
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))


def _cannot_meet(reason: str) -> str:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in reason:
        return (
            f"MASTER_PORT={port} is taken on this machine, perhaps by another training; choose another port "
            "for all ranks: export MASTER_PORT=29501 (mpirun -x MASTER_PORT, deepspeed --master_port, "
            "torchrun --master-port)"
        )
    return (
        f"the ranks cannot meet at MASTER_ADDR={address} MASTER_PORT={port}: {reason.splitlines()[0]}; rank "
        "0 must run on that machine, and the others must reach that port"
    )


class Engine:
    """A model under ZeRO: encode, backward, step."""

    def __init__(
        self,
        model: nn.Module,
        *,
        deepspeed_config: dict[str, Any],
        optimizer: OptimizerConfig,
        num_steps: int,
        autocast_dtype: torch.dtype | None,
        device: torch.device,
        keep_vision: KeepVision = "gpu",
        first_pass_chunks: int = 1,
    ) -> None:
        """Collective. `deepspeed_config` is final: batch sizes and precision are filled in
        (launcher/run/config.py). first_pass_chunks: where the model draws no random numbers."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = device
        self.model = model
        for buffer in model.buffers():  # of a model that was partitioned while loading DeepSpeed moves none
            buffer.data = buffer.data.to(device)
        self._autocast_dtype = autocast_dtype
        self.first_pass_chunks = 1 if draws_random_numbers(model) else first_pass_chunks
        self.feature_memory = FeatureMemory(keep_vision, device)
        self.gathers = Gathers()
        """ZeRO-3's all-gathers of parameters on this rank, since the beginning."""
        self.deepspeed_config = fill_in(deepspeed_config, model)
        gather_whole(deepspeed_config, model)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(trainable, optimizer),
            model_parameters=trainable,
            config=leaving_linear(self.deepspeed_config),
            lr_scheduler=lambda wrapped: build_schedule(wrapped, optimizer, num_steps=num_steps),
            dist_init_required=False,
        )

    def encode(self, inputs: ModelInputs) -> Encoded:
        """What the model says of the rows of one chunk, wherever its tensors are. Under ZeRO-3 a
        collective."""
        with self._autocast(), self._attention(), self._zero3():
            return self.deepspeed(to_device(inputs, self.device))

    def encode_together(self, chunks: Sequence[ModelInputs]) -> list[Encoded]:
        """What the model says of each chunk, from one forward. Under ZeRO-3 a collective."""
        model: Any = self.model
        on_device = [to_device(chunk, self.device) for chunk in chunks]
        return encode_joined(self.encode, on_device, model.family)

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        """The chunks of a step with the output of a frozen vision tower in place of the pixels, so that the
        tower runs once for both passes and once for each different image. The same chunks where that saves
        nothing: a tower that trains, one chunk, keep_vision "off". Every step begins with it.

        Under ZeRO-3 a collective: every rank must call it with the same number of chunks.
        """
        model: Any = self.model
        self.feature_memory.start_step()
        if self.feature_memory.where == "off" or len(chunks) == 1 or not model.tower.is_frozen:
            return chunks
        is_collective = self.deepspeed.zero_optimization_partition_weights()

        def agree(num_calls: int) -> int:
            return max_over_ranks([num_calls], device=self.device)[0] if is_collective else num_calls

        with torch.no_grad(), self._autocast(), self._attention(), self._zero3():
            return with_image_features(
                chunks,
                model.tower,
                encode=lambda inputs: model.encode_images(to_device(inputs, self.device)),
                keep=self.feature_memory.keep,
                agree=agree,
            )

    @contextlib.contextmanager
    def evaluating(self, *, seed: int) -> Iterator[None]:
        """In here the model is in evaluation mode, keeps no graph, and draws from `seed` what it draws.

        Afterwards each module is in its mode of before, and so are all random states and the count of
        gathers: the training goes on as if nothing had been encoded. Only DeepSpeed records the order of its
        gathers again, so the next step may gather the same parameters in more pieces.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        gathers = replace(self.gathers)
        try:
            with unchanged_random_states(), torch.no_grad():
                torch.manual_seed(seed)
                self.model.eval()
                yield
        finally:
            for module, is_training in modes:
                module.training = is_training
            self.gathers.count, self.gathers.num_bytes = gathers.count, gathers.num_bytes

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of `loss`; on the last call of a step the ranks average theirs. Collective.

        The boundary is moved by hand: with several backwards in a step, ZeRO-1 and 2 would otherwise keep
        only part of the gradient, silently.
        """
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        with self._attention(), self._zero3():  # checkpointing computes attention again
            self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> bool:
        """Clip, update, advance the schedule. Collective.

        False when the gradient norm over all ranks was not finite: then no rank has changed parameters or
        optimizer. Raises TrainingError when ZeRO-3 lost a gradient.
        """
        if self.deepspeed.zero_optimization_stage() == 3:
            check_all_reduced(self.model)
        with self._zero3():
            self.deepspeed.step()
        self.feature_memory.end_step()
        return self.deepspeed.was_step_applied()

    @property
    def gradient_norm(self) -> float:
        """Norm over all parameters and ranks before clipping, of the last step."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    @property
    def learning_rate(self) -> float:
        """What the next step will use."""
        return self.deepspeed.get_lr()[0]

    @contextlib.contextmanager
    def _zero3(self) -> Iterator[None]:
        with efficient_linear(self.deepspeed_config), counted_gathers(self.deepspeed_config, self.gathers):
            yield

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """Plain products on a CPU in 16 bit: for rows of 16 to 40 tokens torch's fused kernel takes 3 to 12
        times as long (2.13, AVX-512, forward and backward); from about 200 tokens on it would be faster."""
        is_16_bit_cpu = self.device.type == "cpu" and self._autocast_dtype is not None
        return sdpa_kernel(SDPBackend.MATH) if is_16_bit_cpu else contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast_dtype)
