"""What fits is found before the first step, used, and used again; with an injected lack of memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from agff.errors import CheckpointError
from data_pipeline.collate import FixedRows, TokenBudget
from launcher.run.chunk_search import CHUNK_FILE, FoundChunk, _read, largest_that_fits
from tests.launcher.run.test_config import quickstart, resolve_on
from tests.launcher.runs import run_command, train_command

RUN = "runs/searched"
OPTIONS = f"--run_dir {RUN} --batch.chunk_size auto --backbone.gradient_checkpointing auto"
TIGHT = """
import sys

import torch

import launcher.run.chunk_search
from launcher import train

right = launcher.run.chunk_search.train_step


def train_step(engine, objective, fusion, batch):
    rows = max(len(chunk["input_ids"]) for chunk in batch.chunks)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in engine.model.modules())
    result = right(engine, objective, fusion, batch)
    if engine.deepspeed.global_rank == 1 and rows > (MOST if recomputes else MOST - 1):
        raise torch.OutOfMemoryError("injected, after the step: the ranks are at the same place")
    return result


launcher.run.chunk_search.train_step = train_step
sys.exit(train.main())
"""


@pytest.mark.parametrize(("most", "expected"), [(100, 12), (12, 12), (11, 6), (5, 3), (2, 1), (0, None)])
def test_halves_until_it_fits(most: int, expected: int | None) -> None:
    assert largest_that_fits(12, lambda rows: rows <= most) == expected


def test_what_was_found_takes_the_place_of_auto() -> None:
    run = resolve_on(quickstart("--batch.chunk_size", "auto"), world_size=2)
    assert run.is_searched
    found = FoundChunk(rows=6, tokens=50, gradient_checkpointing=False)
    assert found.applied_to(run).chunking == TokenBudget(max_tokens=300)
    assert found.applied_to(run).config.backbone.gradient_checkpointing is False
    everything = dataclasses.replace(found, rows=run.most_items)
    assert everything.applied_to(run).chunking == FixedRows(rows=run.most_items)
    fixed = resolve_on(quickstart("--backbone.gradient_checkpointing", "auto"), world_size=2)
    assert found.applied_to(fixed).chunking == fixed.chunking, "given in the recipe"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert _read(tmp_path / CHUNK_FILE) is None
    for content in ("{", "[]", '{"rows": 1}'):
        (tmp_path / CHUNK_FILE).write_text(content)
        with pytest.raises(CheckpointError, match=r"chunk\.json: not what this program writes.*; remove it"):
            _read(tmp_path / CHUNK_FILE)


def tight(project: Path, most: int) -> str:
    """The command on a machine that holds this many rows at once."""
    name = f"train_tight_{most}.py"
    (project / "launcher" / name).write_text(TIGHT.replace("MOST", str(most)))
    return f"{train_command(3)} {OPTIONS}".replace("train.py", name)


@pytest.mark.timeout(300)
def test_a_run_finds_what_fits_and_uses_it_again(project: Path) -> None:
    result = run_command(tight(project, 3), project)
    assert result.returncode == 0, result.stdout
    run = project / RUN
    found = json.loads((run / CHUNK_FILE).read_text())
    assert (found["rows"], found["gradient_checkpointing"]) == (3, True), "of 12 items 12, 6, 3 were tried"
    assert yaml.safe_load((run / "config.yaml").read_text())["batch"]["chunk_size"] == "auto"
    newest = run / "checkpoints" / "step-000004"
    newest.rename(run / "gone")
    again = run_command(tight(project, 0), project)
    assert again.returncode == 0, f"it was not tried again\n{again.stdout}"
    assert newest.exists()


@pytest.mark.timeout(300)
def test_where_not_one_item_fits_it_is_named(project: Path) -> None:
    result = run_command(f"rm -rf {RUN}; {tight(project, 0)}", project)
    assert result.returncode != 0
    assert (
        "error: batch.chunk_size=auto: not even one item fits into the memory of every rank: "
        in result.stdout
    )
    assert "lower processor.max_tokens or processor.max_pixels" in result.stdout
