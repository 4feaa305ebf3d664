"""What a run is to be validated on is looked at before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agff.errors import AgffError, ConfigError, DataError
from launcher.command_line import parse_train_arguments
from launcher.run.config import RunConfig, resolve
from launcher.run.data import build_processor, open_data
from launcher.run.hardware import Hardware
from launcher.train import main as train_main
from launcher.validation.sets import ValidationSets, check_sets_together, described, open_sets
from tests.captions import write_tables
from tests.drawings import all_scenes

SIZES = ["--num_steps", "4", "--optimizer.warmup_steps", "1", "--data.weights", "null"]
SIZES += ["--batch.global_batch_size", "8", "--batch.chunk_size", "2", "--data.sub_batch_size", "4"]


def config_of(project: Path, *arguments: str) -> RunConfig:
    cache = project / ".cache/quickstart"
    paths = ["--backbone.path", str(cache / "backbone"), "--data.shards", str(cache / "shards")]
    every = ["--validate_every", "2", "--save_every", "2"]
    return parse_train_arguments([*SIZES, *paths, *every, *arguments]).config


def opened(project: Path, *arguments: str) -> tuple[RunConfig, ValidationSets]:
    config = config_of(project, *arguments)
    sets = open_sets(config, open_data(config))
    assert sets is not None
    return config, sets


def checked(config: RunConfig, sets: ValidationSets) -> list[list[int]]:
    values = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    cpu = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False)
    run = resolve(config, values, deepspeed_name="zero2", world_size=2, hardware=cpu)
    return check_sets_together(run, sets, build_processor(config), hashes=False)


@pytest.fixture
def sets(project: Path, tmp_path: Path) -> Path:
    """Evaluation sets of its own to damage."""
    shutil.copytree(project / ".cache/quickstart/data", tmp_path / "sets")
    return tmp_path / "sets"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--validation.mmeb_eval", "nowhere"], DataError, "validation: nowhere: no such folder"),
        (["--validation.mmvp", "nowhere"], DataError, "validation: nowhere/Questions.csv: no such file"),
        (["--validation.captions", "nowhere"], DataError, "validation: nowhere: no such folder"),
        (
            ["--validation.shards", "nowhere"],
            DataError,
            "validation.shards=nowhere: nowhere: no shards here",
        ),
        (
            ["--validation.shards", "{held_out}", "--validation.sources", "[Shapes, Shapes_text]"],
            ConfigError,
            "validation.sources names Shapes, absent from .*; it holds Shapes_VQA, Shapes_i2t, Shapes_t2i, ",
        ),
        (
            ["--validation.shards", "{shards}", "--validation.sources", "[Shapes_text]"],
            DataError,
            r"Shapes_text/Shapes_text-00000.tar is .*shards/Shapes_text/Shapes_text-00000.tar, which is "
            "trained on, so it is not held out",
        ),
        (["--validation.shards", "{shards}"], DataError, "4 shards are trained on too, so they are not held"),
        (
            ["--validation.shards", "{held_out}", "--validation.max_queries", "2"],
            ConfigError,
            "validation.shards=.*: data.caps: 2 samples of Shapes_VQA are fewer than data.sub_batch_size=4",
        ),
        (
            ["--validation.mmvp", "{mmvp}", "--keep_best", "mmvp/Colour"],
            ConfigError,
            "keep_best=mmvp/Colour is no score of this run's validation; it has\n  mmvp\n  "
            "mmvp/Color_and_Appearance\n  mmvp/Quantity_and_Count\n",
        ),
    ],
)
def test_wrong_input_is_named(
    project: Path, held_out: Path, arguments: list[str], kind: type[AgffError], message: str
) -> None:
    cache = project / ".cache/quickstart"
    known = {"{held_out}": held_out, "{shards}": cache / "shards", "{mmvp}": cache / "data/mmvp"}
    with pytest.raises(kind, match=message):
        opened(project, *(str(known.get(argument, argument)) for argument in arguments))


def test_an_objective_that_learns_from_vectors_wants_those_of_the_held_out_pairs(
    project: Path, held_out: Path
) -> None:
    config = config_of(project, "--validation.shards", str(held_out), "--validation.sources", "[Shapes_text]")
    with_teacher = parse_train_arguments(
        ["--recipe", "quickstart_unime1", "--validate_every", "5", "--validation.shards", str(held_out)]
    ).config
    with pytest.raises(ConfigError, match=r"there are none; make them with launcher/embed.py and name their"):
        open_sets(with_teacher, open_data(config))


def test_shards_of_a_source_that_is_not_trained_on_are_held_out(project: Path) -> None:
    shards = str(project / ".cache/quickstart/shards")
    weights = ["--data.weights", "{Shapes_t2i: 1}"]
    held_out = ["--validation.shards", shards, "--validation.sources", "[Shapes_text]"]
    config, found = opened(project, *weights, *held_out, "--keep_best", "held_out/loss")
    assert found.held_out is not None
    assert found.held_out.plan.num_samples == {"Shapes_text": 24}
    assert described(found, config) == (
        "every 2 steps and at the end: 24 held-out pairs of 1 sources in 3 batches; the best checkpoint by "
        "held_out/loss is kept"
    )


def test_every_item_that_cannot_be_used_is_listed(project: Path, sets: Path) -> None:
    images = sorted((sets / "mmeb_eval/images/Shapes").glob("*.png"))
    images[0].write_bytes(b"no image")
    images[1].unlink()
    wide = sets / "mmvp/MLLM_VLM Images/Quantity and Count"
    broken = sorted(wide.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:20])
    config, found = opened(
        project, "--validation.mmeb_eval", str(sets / "mmeb_eval"), "--validation.mmvp", str(sets / "mmvp")
    )
    with pytest.raises(DataError) as caught:
        checked(config, found)
    assert caught.value.on_all_ranks
    for path in (images[0], broken):
        assert str(path) in str(caught.value)
    assert images[1].name in str(caught.value)
    assert "leave their set out of the section validation" in str(caught.value)


def test_an_item_that_does_not_fit_the_model_is_listed(project: Path, sets: Path) -> None:
    config, found = opened(
        project,
        "--validation.mmvp",
        str(sets / "mmvp"),
        "--processor.max_tokens",
        "16",
        "--processor.min_pixels",
        "50000",
    )
    with pytest.raises(DataError, match=r"more than processor.max_tokens=16"):
        checked(config, found)


def test_held_out_pairs_that_the_run_cannot_read_are_refused(project: Path, held_out: Path) -> None:
    texts_alone = ["--backbone.text_only", "true", "--backbone.lora.rank", "2"]
    config, found = opened(project, *texts_alone, "--validation.shards", str(held_out))
    with pytest.raises(DataError, match=r"(?s)validation\.shards: .*the run trains on texts alone") as caught:
        checked(config, found)
    assert caught.value.on_all_ranks


def test_lengths_are_those_of_the_used_items_and_equal_questions_have_equal_fingerprints(
    project: Path, sets: Path
) -> None:
    arguments = ["--validation.mmeb_eval", str(sets / "mmeb_eval"), "--validation.max_queries", "4"]
    config, found = opened(project, *arguments)
    lengths = checked(config, found)
    assert [len(each) for each in lengths] == [len(each.used) for each in found.benchmarks]
    original = project / ".cache/quickstart/data/mmeb_eval"
    _, elsewhere = opened(project, "--validation.mmeb_eval", str(original), "--validation.max_queries", "4")
    _, more = opened(project, "--validation.mmeb_eval", str(original), "--validation.max_queries", "5")
    assert found.fingerprint == elsewhere.fingerprint != more.fingerprint


def test_names_of_caption_sets_and_the_table(project: Path, tmp_path: Path) -> None:
    captions = {}
    for scene in all_scenes()[:3]:
        scene.draw().save(tmp_path / scene.file_name)
        captions[str(tmp_path / scene.file_name)] = [scene.text]
    write_tables(tmp_path / "tables", captions)
    config, found = opened(project, "--validation.captions", str(tmp_path / "tables"))
    directions = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert found.names == [f"captions/tables/{direction}" for direction in directions]
    assert described(found, config) == "every 2 steps and at the end: captions of tables, 6 items in all"


def test_dry_run_says_what_is_validated_and_looks_at_the_images(
    project: Path, sets: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    paths = ["--backbone.path", ".cache/quickstart/backbone", "--data.shards", ".cache/quickstart/shards"]
    command = [*SIZES, *paths, "--run_dir", "runs/none", "--dry-run"]
    named = ["--validation.mmeb_eval", str(sets / "mmeb_eval")]
    for arguments, row in (
        ([], "none"),
        (named, "none, validate_every is null"),
        (
            [*named, "--validate_every", "2", "--save_every", "1", "--keep_best", "mmeb"],
            "every 2 steps and at the end: 3 MMEB sets with 72 queries, ",
        ),
    ):
        assert train_main([*command, *arguments]) == 0
        assert f"  validation           {row}" in capfd.readouterr().out
    image = sorted((sets / "mmeb_eval/images/Shapes").glob("*.png"))[0]
    image.write_bytes(b"no image")
    assert train_main([*command, *named, "--validate_every", "2"]) == 2
    assert str(image) in capfd.readouterr().err
    assert not (project / "runs/none").exists()
