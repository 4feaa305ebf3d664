"""Evaluation on several ranks: the same JSON as one process, and all stop together."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agff.collectives import rank
from agff.embedder import Embedder
from agff.errors import AgffError, CheckpointError
from launcher.evaluate import main, run
from launcher.evaluation.options import parser
from tests.drawings import write_drawings
from tests.launcher.encoding.cases import cached_twice, cases, damaged, fails_on_rank_1
from tests.launcher.encoding.models import load_tiny, write_tiny
from tests.launcher.runs import run_command
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the sets of our own drawings; `gaps` lacks an image."""
    folder = write_tiny(tmp_path_factory.mktemp("ranks"))
    write_drawings(folder / "data", num_images=12)
    for machine in ("machine0", "machine1"):
        shutil.copytree(folder / "data", folder / machine)
    sorted((folder / "machine1/mmvp").rglob("*.jpg"))[3].unlink()
    table = folder / "machine1/mmeb_eval/sets.json"
    listed = json.loads(table.read_text())
    del listed["Shapes_VQA-eval"]
    table.write_text(json.dumps(listed))
    shutil.rmtree(table.with_name("Shapes_VQA-eval"))
    for name in ("missing", "damaged"):
        shutil.copytree(folder / "data/mmvp", folder / name)
        image = sorted((folder / name).rglob("*.jpg"))[3]
        if name == "missing":
            image.rename(image.with_name("away.txt"))
        else:
            shutil.copy(Path(damaged(folder).name), image)
    return folder


def arguments(folder: Path, out: Path, *options: str) -> argparse.Namespace:
    data = folder / "data"
    sets = ("--mmeb_eval", str(data / "mmeb_eval"), "--mmvp", str(data / "mmvp"))
    return parser().parse_args(
        [str(folder), *sets, "--out", str(out), "--batch_size", "5", "--max_queries", "6", *options]
    )


def evaluated(folder: Path, out: Path) -> str:
    text, failures = run(arguments(folder, out), lambda path: load_tiny(folder, max_tokens=96))
    assert failures == []
    return text


def without_dates(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_dates(each) for name, each in value.items() if name != "date"}
    return [without_dates(each) for each in value] if isinstance(value, list) else value


def on_a_rank(folder: Path, out: Path) -> list[str]:
    """Evaluate well, then with faults that one rank alone has or meets; the errors."""
    evaluated(folder, out)

    def too_late(path: Path) -> Embedder:
        if rank() == 1:
            raise CheckpointError("no weights on this machine")
        return load_tiny(folder, max_tokens=96)

    errors = []
    for name in ("missing", "damaged"):
        options = parser().parse_args(
            [str(folder), "--mmvp", str(folder / name), "--out", str(out.with_name("faulty.json"))]
        )
        try:
            _, failures = run(options, lambda path: load_tiny(folder))
        except AgffError as error:
            failures = [str(error)]
        errors.append(failures[0])
    try:
        run(arguments(folder, out.with_name("never.json")), too_late)
    except CheckpointError as error:
        errors.append(str(error))
    assert not out.with_name("never.json").exists()
    return errors


def on_other_machines(folder: Path, out: Path) -> list[str]:
    """What a rank sees that is not what rank 0 sees: an image fewer, a set fewer, other weights."""
    errors = []
    os.chdir(folder / f"machine{min(rank(), 1)}")  # the same paths, as on machines with disks of their own
    for allowed in ([], ["--allow_missing"]):
        options = ["--mmvp", "mmvp", "--out", str(out.with_name("never.json")), *allowed]
        errors.append(error_of(options, folder))
    errors.append(error_of(["--mmeb_eval", "mmeb_eval", "--out", str(out)], folder))
    options = ["--mmvp", str(folder / "data/mmvp"), "--out", str(out.with_name("never.json"))]
    errors.append(error_of(options, folder, seed=min(rank(), 1)))
    assert not out.with_name("never.json").exists()
    return errors


def error_of(options: list[str], folder: Path, *, seed: int = 0) -> str:
    try:
        run(parser().parse_args([str(folder), *options]), lambda path: load_tiny(folder, seed=seed))
    except AgffError as error:
        return f"{type(error).__name__}: {error}, {error.on_all_ranks}"
    return "no error"


def everything(folder: Path, out: Path) -> tuple[Any, Any, str, list[str]]:
    cached = cached_twice(folder, out.with_name("cache"))
    errors = on_a_rank(folder, out) + on_other_machines(folder, out)
    return cases(folder), cached, fails_on_rank_1(folder), errors


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """(vectors, scores) of one process."""
    out = tmp_path_factory.mktemp("alone") / "scores.json"
    evaluated(folder, out)
    return cases(folder), without_dates(json.loads(out.read_text()))


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_give_the_bits_and_write_the_scores_of_one_process(
    folder: Path, alone: tuple[dict[str, Any], Any], tmp_path: Path, world_size: int
) -> None:
    vectors, scores = alone
    out = tmp_path / "scores.json"
    returned = run_ranks(everything, folder, out, world_size=world_size)
    for found, (half, whole, num_parts), not_finite, errors in returned:
        assert found.keys() == vectors.keys()
        for name, (vectors_NMD, refused) in found.items():
            assert vectors_NMD.tobytes() == vectors[name][0].tobytes(), name
            assert refused == vectors[name][1], name
        assert (half == whole[::2]).all()
        torch.testing.assert_close(torch.tensor(whole), torch.tensor(vectors["all"][0]))
        assert num_parts == 2
        assert not_finite.startswith("Shapes: the model gives embeddings that are not finite")
        assert errors == returned[0][3], "all stop with the same words"
    assert without_dates(json.loads(out.read_text())) == scores
    assert scores["mmeb"]["sets"]
    missing, damaged, late, fewer_images, allowed, fewer_sets, other_weights = returned[0][3]
    assert "not found under" in missing
    assert "is a damaged PNG" in damaged
    assert late == "no weights on this machine"
    others = ", ".join(map(str, range(1, world_size)))
    assert fewer_images == allowed
    assert fewer_images.startswith(
        f"DataError: MMVP: of {world_size} ranks these see another set than rank 0: {others} (rank 1: "
    )
    assert "not found under" in fewer_images
    assert f"ranks these see another set than rank 0: {others} (rank 1: no " in fewer_sets
    assert f"ranks these read other weights than rank 0: {others}; the run saved " in other_weights
    assert all(error.endswith(", True") for error in (fewer_images, fewer_sets, other_weights))
    assert [path.name for path in tmp_path.glob(".scores*unfinished")] == []


def test_the_deepspeed_launcher_on_two_ranks_writes_the_scores_of_one_process(
    project: Path, train_once: Callable[[int], tuple[Path, str]], tmp_path: Path
) -> None:
    """With processes that load items, and a cache that the second evaluation reads."""
    model, _ = train_once(3)
    mmeb_eval = project / ".cache/quickstart/data/mmeb_eval"
    command = f"launcher/evaluate.py {model} --mmeb_eval {mmeb_eval} --max_queries 6"
    more = f"--num_workers 1 --cache {tmp_path}/cache --out {tmp_path}/ranks.json"
    result = run_command(f"deepspeed --num_accelerators 2 {command} {more}", project)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("mean overall") == 1, "one rank speaks"
    options = [*command.split()[1:], "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/alone.json"]
    assert main(options) == 0
    ranks, alone = (
        without_dates(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("ranks", "alone")
    )
    assert ranks == alone
    assert ranks["mmeb"]["sets"]
