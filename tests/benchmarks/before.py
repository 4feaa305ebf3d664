"""The quickstart's step beside that of commit 11bafd8, each with its own code, on the same items in turn.

The earlier code is written into a temporary folder by `git archive`; its ranks import it from there.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import yaml

from tests.benchmarks.table import Row
from tests.benchmarks.turns import Cases, Contender, Ratio, take_turns

if TYPE_CHECKING:  # else the ranks of the earlier commit would run this commit's
    from tests.benchmarks.steps import Setting

COMMIT = "11bafd8"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class EarlierStep:
    """What a rank of the earlier code needs, in plain values."""

    code: Path
    backbone: Path
    precision: str
    pairs: list[tuple[tuple[str, Any], tuple[str, Any]]]
    """Text and image of each query and target of the global batch."""
    chunk_size: int
    num_fine: int
    max_tokens: int
    temperature: float
    bidirectional: bool


def against_earlier_commit(folder: Path, *, quick: bool) -> list[Row]:
    """Time of a step under ZeRO-3 on two ranks, for the values of the recipe of then and of today.

    folder: a backbone of the sizes of then.
    """
    from launcher.quickstart.backbone import build_tiny_qwen2vl
    from launcher.run.hardware import Hardware
    from tests.benchmarks.steps import how_often, median_ms, our_steps
    from tests.benchmarks.synthetic import QUICK_SIZES

    precision = Hardware.of_this_machine().choose_precision("auto")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        earlier, today = Path(name) / "code", Path(name) / "backbone"
        if not _is_written(earlier):
            sys.stderr.write(f"commit {COMMIT} is not in this clone: nothing to compare with\n")
            return []
        build_tiny_qwen2vl(today, seed=0, sizes=QUICK_SIZES if quick else None)
        for whose, code, backbone, chunks in (
            (COMMIT, earlier, folder, "4 chunks"),
            ("today", ROOT, today, "one pass"),
        ):
            recipe = yaml.safe_load((code / "launcher/recipes/quickstart.yaml").read_text(encoding="utf-8"))
            setting = _setting(recipe, backbone, precision)
            step = _earlier_step(recipe, setting, earlier)
            ours = Contender(name="ours", make=our_steps, arguments=(setting, 3, (chunks,)), num_ranks=2)
            theirs = Contender(name=COMMIT, make=earlier_steps, arguments=(step,), num_ranks=2)
            times = take_turns([ours, theirs], **how_often(quick))
            rows.append(
                Row.of(
                    Ratio.of(times["ours", chunks], times[COMMIT, "step"]),
                    group="before",
                    what="the quickstart's step, 2 ranks, ZeRO-3",
                    case=f"values of {whose}: {setting.num_pairs} pairs, {chunks}",
                    against=f"that of commit {COMMIT}",
                    quantity="time",
                    note=f"{precision}, theirs {median_ms(times[COMMIT, 'step'])} ms; each with its own "
                    "ds_configs/zero3.json: ours keeps all of a model this small on each rank",
                )
            )
    return rows


def _is_written(folder: Path) -> bool:
    command = ["git", "archive", COMMIT, "agff", "data_pipeline", "launcher", "ds_configs"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return True


def _setting(recipe: dict[str, Any], backbone: Path, precision: str) -> Setting:
    from agff.objectives.contrastive import Contrastive
    from agff.processor import ProcessorConfig
    from tests.benchmarks.steps import Setting
    from tests.benchmarks.synthetic import PROMPTS

    assert recipe["prompts"]["num_fine"] == PROMPTS.num_fine
    loss = {name: recipe["loss"][name] for name in ("temperature", "bidirectional", "amplification")}
    return Setting(
        folder=backbone,
        num_pairs=recipe["batch"]["global_batch_size"],
        limits=ProcessorConfig(**recipe["processor"]),
        precision=precision,
        loss=Contrastive(**loss),
        largest_whole=None,
    )


def _earlier_step(recipe: dict[str, Any], setting: Setting, code: Path) -> EarlierStep:
    from tests.benchmarks.synthetic import examples

    return EarlierStep(
        code=code,
        backbone=setting.folder,
        precision=setting.precision,
        pairs=[
            ((pair.query.text, pair.query.image), (pair.target.text, pair.target.image))
            for pair in examples(setting.num_pairs)
        ],
        chunk_size=recipe["batch"]["chunk_size"],
        num_fine=recipe["prompts"]["num_fine"],
        max_tokens=setting.limits.max_tokens,
        temperature=setting.loss.temperature,
        bidirectional=setting.loss.bidirectional,
    )


def earlier_steps(step: EarlierStep) -> Cases:
    """{"step": one optimizer step} with the code in `step.code`. Collective."""
    sys.path.insert(0, str(step.code))
    config = import_module("launcher.config")
    assert Path(config.__file__).is_relative_to(step.code), "another commit's code was there before"
    batch, decode = import_module("agff.batch"), import_module("data_pipeline.decode")
    run = config.resolve(
        config.RunConfig(
            name="bench",
            num_steps=10**6,
            precision=step.precision,
            backbone=config.BackboneConfig(path=str(step.backbone), gradient_checkpointing=False),
            prompts=config.PromptConfig(num_fine=step.num_fine),
            processor=config.ProcessorConfig(max_tokens=step.max_tokens),
            loss=config.LossConfig(temperature=step.temperature, bidirectional=step.bidirectional),
            optimizer=config.OptimizerConfig(learning_rate=1e-5),
            batch=config.BatchConfig(global_batch_size=len(step.pairs), chunk_size=step.chunk_size),
            data=config.DataConfig(shards="", sub_batch_size=len(step.pairs)),
        ),
        config.read_deepspeed_json(step.code / "ds_configs/zero3.json"),
        deepspeed_name="zero3",
        world_size=dist.get_world_size(),
        hardware=config.Hardware.of_this_machine(),
    )
    own = [
        decode.Example(
            query=batch.Item(text=query[0], image=query[1]),
            target=batch.Item(text=target[0], image=target[1]),
            negative=None,
            query_id=2 * number,
            target_id=2 * number + 1,
            negative_id=batch.NO_CONTENT,
            address=f"noise:{number}",
        )
        for number, (query, target) in enumerate(step.pairs)
    ][dist.get_rank() :: dist.get_world_size()]
    return {"step": _earlier_train_step(run, own)}


def _earlier_train_step(run: Any, own: list[Any]) -> Any:
    engine, model = import_module("agff.engine"), import_module("launcher.model")
    device = engine.start_process_group(dist.get_rank())
    processor = model.build_processor(run.config)
    return partial(
        import_module("agff.step").train_step,
        engine.Engine(
            model.build_model(run, processor),
            deepspeed_config=run.deepspeed,
            optimizer=run.config.optimizer,
            num_steps=run.config.num_steps,
            precision=run.precision,
            device=device,
        ),
        partial(import_module("agff.objectives.contrastive").contrastive_loss, config=run.config.loss),
        import_module("data_pipeline.collate").collate(own, processor, chunking=run.chunking),
    )
