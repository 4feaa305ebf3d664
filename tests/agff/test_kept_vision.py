"""A frozen tower runs once a step: counts, and equal bits, in models of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agff.backbone import LoraConfig
from agff.batch import Encoded, Item, ModelInputs
from agff.embedding_model import EmbeddingModel
from agff.engine import Engine, start_process_group
from agff.joined import encode_joined
from agff.kept_vision import DeviceMemory, FeatureMemory, KeepVision, new_images, with_image_features
from agff.objectives.contrastive import Contrastive
from agff.shared_images import IMAGE_FEATURES
from agff.similarity import FusionConfig
from agff.step import train_step
from data_pipeline.collate import FixedRows, collate
from data_pipeline.decode import Example
from tests.agff.family_folders import BUILDERS
from tests.agff.test_step import OPTIMIZER, zero_config
from tests.agff.test_vision import (
    SQUARE,
    TALL,
    TEXTS,
    WIDE,
    about,
    build,
    embedding_and_gradients,
    processor_of,
)
from tests.ranks import run_ranks

FROZEN: dict[str, dict[str, Any]] = {
    "frozen vision": {"freeze_vision": True},
    "lora": {"lora": LoraConfig(rank=2, dropout=0.25)},
}
TRAINING = {**FROZEN, "full": {}}
CASES: list[tuple[str, int, str, bool]] = [
    *((family, 3, "lora", True) for family in BUILDERS),
    ("qwen3_vl", 3, "frozen vision", True),
    ("llava_onevision", 3, "frozen vision", False),
    ("qwen2_5_vl", 3, "full", True),
    ("qwen2_vl", 2, "lora", False),
    ("llava_onevision", 2, "frozen vision", True),
]
"""Family, ZeRO stage, what trains, gradient checkpointing."""
PLACES: tuple[KeepVision, ...] = ("off", "gpu", "host")
CALLS_IN_BOTH_PASSES = 2 * 3 - 1
"""Three chunks, the first of which is encoded once: it keeps its graph."""
STAND_STILL = replace(OPTIMIZER, learning_rate=1e-30)
"""Too little to move a float32, so that one engine takes the same step again."""


def pairs_of(rank: int) -> list[Example]:
    """Rank 0: two images in a chunk, one beside a text, texts alone. Rank 1: texts alone in each chunk."""
    if rank == 0:
        queries = [about(WIDE, "what?"), about(SQUARE, "which?"), about(TALL, "where is it?")]
    else:
        queries = [*TEXTS, Item(text="red")]
    targets = [Item(text="one of these"), *reversed(TEXTS)]
    return [
        Example(
            query=query,
            target=target,
            query_id=10 * rank + number,
            target_id=100 + 10 * rank + number,
            address=f"pair:{number}",
        )
        for number, (query, target) in enumerate(zip(queries, targets, strict=True))
    ]


@dataclass
class Recorder:
    """The engine of a step, and what went through it."""

    engine: Engine
    embeddings: list[Tensor]
    gradients: dict[str, Tensor | None]
    first_pass_chunks: int = 1

    def encode_together(self, chunks: Sequence[ModelInputs]) -> list[Encoded]:
        return [self.encode(chunk) for chunk in chunks]

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        return self.engine.with_image_features(chunks)

    def encode(self, inputs: ModelInputs) -> Encoded:
        encoded = self.engine.encode(inputs)
        self.embeddings.append(encoded["embedding"].detach())
        return encoded

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.backward(loss, is_last)

    def step(self) -> bool:
        named = self.engine.model.named_parameters()
        self.gradients = {name: safe_get_full_grad(p) for name, p in named if p.requires_grad}
        return self.engine.step()


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What one step of one rank did."""

    embeddings: list[Tensor]
    gradients: dict[str, Tensor | None]
    loss: Tensor
    tower_calls: int


def steps_of(folder: Path, stage: int, training: str, checkpointing: bool) -> dict[KeepVision, Stepped]:
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed_config = zero_config(stage, 3, clip=0.0)
    partitioned = HfDeepSpeedConfig(deepspeed_config) if stage == 3 else None
    model = build(folder, checkpointing=checkpointing, **TRAINING[training])
    del partitioned
    device = torch.device("cpu")
    engine = Engine(
        model,
        deepspeed_config=deepspeed_config,
        optimizer=STAND_STILL,
        num_steps=len(PLACES),
        autocast_dtype=None,
        device=device,
    )
    batch = collate(pairs_of(dist.get_rank()), processor_of(folder), chunking=FixedRows(rows=2))
    found = {}
    for place in PLACES:
        engine.feature_memory = FeatureMemory(place, device)
        recorder = Recorder(engine, [], {})
        torch.manual_seed(1)
        with counted_calls(model.tower.module) as calls:
            loss = train_step(recorder, Contrastive(), FusionConfig(), batch).loss
        found[place] = Stepped(
            embeddings=recorder.embeddings, gradients=recorder.gradients, loss=loss, tower_calls=len(calls)
        )
    return found


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    hook = module.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    hook.remove()


Steps = dict[tuple[Any, ...], dict[KeepVision, Stepped]]


def steps_of_all_cases(folders: dict[str, Path]) -> Steps:
    start_process_group(dist.get_rank())
    return {(family, *case): steps_of(folders[family], *case) for family, *case in CASES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family, write in BUILDERS.items():
        found[family] = tmp_path_factory.mktemp(family) / "backbone"
        torch.manual_seed(0)
        write(found[family])
    return found


@pytest.fixture(scope="module")
def stepped(folders: dict[str, Path]) -> list[Steps]:
    """Of each rank."""
    return run_ranks(steps_of_all_cases, folders, world_size=2)


def test_embeddings_and_gradients_are_the_same_bits_wherever_features_are_kept(stepped: list[Steps]) -> None:
    for steps in stepped:
        for case, by_place in steps.items():
            off = by_place["off"]
            assert len(off.embeddings) == CALLS_IN_BOTH_PASSES
            assert max(float(g.abs().max()) for g in off.gradients.values() if g is not None) > 1e-3
            for place in ("gpu", "host"):
                kept = by_place[place]
                assert torch.equal(kept.loss, off.loss), (case, place)
                assert all(map(torch.equal, kept.embeddings, off.embeddings)), (case, place)
                assert kept.gradients.keys() == off.gradients.keys()
                for name, gradient in off.gradients.items():
                    assert gradient is not None, name
                    assert torch.equal(kept.gradients[name], gradient), (case, place, name)


def test_a_frozen_tower_runs_once_for_each_chunk_that_has_an_image_of_its_own(stepped: list[Steps]) -> None:
    """Rank 0 has three such chunks (the third one's is blank), rank 1 one. Under ZeRO-3 the ranks agree."""
    for rank, steps in enumerate(stepped):
        for case, by_place in steps.items():
            _, stage, training, _ = case
            assert by_place["off"].tower_calls == CALLS_IN_BOTH_PASSES, case
            once = 3 if stage == 3 or rank == 0 else 1
            expected = CALLS_IN_BOTH_PASSES if training == "full" else once
            assert by_place["gpu"].tower_calls == by_place["host"].tower_calls == expected, case


# ---------------------------------------------------------------- in one process


@dataclass
class PlainEngine:
    """Without ZeRO; `keeps`: as Engine with a frozen tower."""

    model: EmbeddingModel
    keeps: bool
    first_pass_chunks: int = 2

    def encode_together(self, chunks: Sequence[ModelInputs]) -> list[Encoded]:
        return encode_joined(self.encode, chunks, self.model.family)

    def with_image_features(self, chunks: Sequence[ModelInputs]) -> Sequence[ModelInputs]:
        return features_of(self.model, chunks) if self.keeps else chunks

    def encode(self, inputs: ModelInputs) -> Encoded:
        return self.model(inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self) -> bool:
        return True


def features_of(
    model: EmbeddingModel, chunks: Sequence[ModelInputs], calls: int | None = None
) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return with_image_features(
            chunks,
            model.tower,
            encode=model.encode_images,
            keep=lambda features: features,
            agree=lambda needed: calls or needed,
        )


def flops(run: Callable[[], object]) -> int:
    """Of matrix products and convolutions; torch does not count attention on a CPU."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(params=sorted(BUILDERS))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def test_a_step_with_a_frozen_tower_and_adapters_costs_one_tower_and_three_language_models(
    folder: Path,
) -> None:
    """Forward twice and backward once; the first chunk's forward once. No backward of the tower."""
    model = build(folder, **FROZEN["lora"])
    batch = collate(pairs_of(0), processor_of(folder), chunking=FixedRows(rows=3))
    assert len(batch.chunks) == 2, "images, texts"
    ready = features_of(model, batch.chunks)

    def of_step(chunks: Sequence[ModelInputs], keeps: bool) -> int:
        step = partial(train_step, PlainEngine(model, keeps), Contrastive(), FusionConfig())
        return flops(lambda: step(replace(batch, chunks=tuple(chunks))))

    tower = [flops(lambda chunk=chunk: model.encode_images(chunk)) for chunk in batch.chunks]
    language = sum(flops(lambda chunk=chunk: model(chunk)) for chunk in ready)
    once, twice = of_step(batch.chunks, True), of_step(batch.chunks, False)
    assert once == sum(tower) + of_step(ready, False)
    assert twice == once + tower[1]
    assert 0 < tower[1] < tower[0], "the one that keeps its graph is the larger one, and runs once anyway"
    assert sum(tower) + 2 * language < once <= 1.1 * (sum(tower) + 3 * language)


@pytest.mark.parametrize("training", FROZEN)
def test_an_image_of_several_chunks_is_encoded_once(folder: Path, training: str) -> None:
    model = build(folder, dtype=torch.float64, **FROZEN[training]).eval()  # no dropout, which the chunks draw
    process = processor_of(folder)
    chunks = [
        process(items)
        for items in (
            [about(WIDE, "what?"), about(SQUARE, "which?")],
            TEXTS,
            [about(TALL, "where?"), about(WIDE, "who?"), about(TALL, "why?"), TEXTS[0]],
            [about(SQUARE, "how?")],
            TEXTS[:1],
        )
    ]
    assert new_images(chunks) == [[0, 1], [0], [0], [], []]
    with counted_calls(model.tower.module) as calls:
        ready = features_of(model, chunks)
        assert len(calls) == 3
        features_of(model, chunks, calls=5)
        assert len(calls) == 3 + 5, "as often as the rank that needs most"

    def of(chunks: Sequence[ModelInputs]) -> dict[str, Tensor]:
        return embedding_and_gradients(
            model, lambda: torch.cat([model(chunk)["embedding"] for chunk in chunks])
        )

    found, expected = of(ready), of(chunks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert difference <= 1e-12, f"{name}: {difference:.1e}"


GIB = 2**30


@dataclass
class Memory:
    """A device of 80 GiB of which 78 are usable and 8 are left free. As torch's, the peak only rises until it
    is restarted."""

    peak: int = 0

    def now(self) -> DeviceMemory:
        return DeviceMemory(total=80 * GIB, usable=78 * GIB, peak=self.peak)

    def restart_peak(self) -> None:
        self.peak = 0

    def use(self, num_bytes: int) -> None:
        self.peak = max(self.peak, num_bytes)


GPU = torch.device("cuda")  # a name; the tensors have no memory
FEATURES = torch.empty(GIB // 2, dtype=torch.float16, device="meta")  # 1 GiB


def take_step(memory: FeatureMemory, device: Memory, *, peak: int, offered: int) -> int:
    """How many of the offered features stay on the device in a step that needs `peak` GiB beside them."""
    memory.start_step()
    kept = sum(memory.fits(FEATURES) for _ in range(offered))
    device.use((peak + kept) * GIB)
    memory.end_step()
    return kept


@pytest.mark.parametrize(
    ("peaks", "offered", "expected"),
    [
        ([66] * 7, [6] * 7, [0, 4, 4, 4, 4, 4, 4]),
        ([66] * 7, [4, 4, 1, 4, 0, 4, 6], [0, 4, 1, 4, 0, 4, 4]),
        ([66, 68, 60, 50, 67], [6] * 5, [0, 4, 2, 2, 2]),
        ([69, 66, 40, 72, 66], [0, 0, 6, 6, 6], [0, 0, 1, 1, 0]),
    ],
    ids=["steady", "kept less at times", "rising and falling", "falling and rising"],
)
def test_features_stay_on_the_device_as_long_as_they_fit_beside_the_highest_peak(
    peaks: list[int], offered: list[int], expected: list[int]
) -> None:
    """Of what is needed beside them; of the first step nothing is known."""
    device = Memory()
    memory = FeatureMemory("gpu", GPU, reader=device)
    found = [
        take_step(memory, device, peak=peak, offered=number)
        for peak, number in zip(peaks, offered, strict=True)
    ]
    assert found == expected


def test_the_run_s_own_peak_outlives_the_steps_and_begins_with_the_engine() -> None:
    device = Memory(peak=79 * GIB)  # of a try that ran out of memory
    memory = FeatureMemory("host", GPU, reader=device)
    assert memory.highest_peak == 0
    device.use(20 * GIB)
    for peak, highest in ((66, 66), (60, 66), (67, 67)):
        assert take_step(memory, device, peak=peak, offered=1) == 0, "the host"
        assert memory.highest_peak == highest * GIB
    device.use(70 * GIB)  # between two steps, while a checkpoint is written
    memory.start_step()
    assert memory.highest_peak == 70 * GIB
    assert FeatureMemory("gpu", torch.device("cpu")).highest_peak is None


@pytest.mark.parametrize(
    ("where", "num_chunks", "is_frozen"), [("gpu", 1, True), ("gpu", 2, False), ("off", 2, True)]
)
def test_a_step_that_keeps_nothing_begins_anew_too(
    where: KeepVision, num_chunks: int, is_frozen: bool
) -> None:
    device = Memory()
    memory = FeatureMemory("gpu", GPU, reader=device)
    take_step(memory, device, peak=66, offered=0)
    assert take_step(memory, device, peak=66, offered=4) == 4
    memory.where = where
    model = SimpleNamespace(tower=SimpleNamespace(is_frozen=is_frozen))
    engine: Any = SimpleNamespace(feature_memory=memory, model=model)
    assert Engine.with_image_features(engine, [{}] * num_chunks) == [{}] * num_chunks
    device.use(68 * GIB)
    memory.end_step()
    memory.where = "gpu"
    assert take_step(memory, device, peak=66, offered=6) == 2, (
        "68 of the step before, of which nothing was kept"
    )


def test_what_is_kept_is_counted_once(folder: Path) -> None:
    """Also of a chunk of which only a part is new: what waits is the whole."""
    model = build(folder, **FROZEN["lora"])
    chunks = [
        processor_of(folder)(items)
        for items in (
            [about(WIDE, "what?"), about(SQUARE, "which?")],
            [about(TALL, "where?"), about(WIDE, "who?"), TEXTS[0]],
            [about(SQUARE, "how?")],
        )
    ]
    kept: list[Tensor] = []

    def keep(features: Tensor) -> Tensor:
        kept.append(features.clone())
        return kept[-1]

    with torch.no_grad():
        ready = with_image_features(
            chunks, model.tower, encode=model.encode_images, keep=keep, agree=lambda needed: needed
        )
    held = {
        f.untyped_storage().data_ptr(): f.untyped_storage().nbytes()
        for f in (r[IMAGE_FEATURES] for r in ready)
    }
    assert len(held) == len(kept) == 2, "the third is a view"
    assert sum(held.values()) == sum(features.nbytes for features in kept)


def test_what_does_not_fit_is_copied_and_without_a_gpu_nothing_is() -> None:
    features = torch.randn(3, 1, 4)
    away = FeatureMemory("host", GPU, reader=Memory()).keep(features)
    assert torch.equal(away, features)
    assert away.data_ptr() != features.data_ptr()
    for where in ("gpu", "host"):
        assert FeatureMemory(where, torch.device("cpu")).keep(features) is features
