"""Recipes and stored configurations: what is given twice, converted or misspelt is named, never guessed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agff.errors import ConfigError
from launcher.command_line import RECIPES, parse_train_arguments
from launcher.run.config import ResolvedRun, RunConfig, as_dict, resolve, run_config_of
from launcher.run.config_file import (
    CONFIG_FILE,
    DEEPSPEED_FILE,
    read_recipe,
    read_run_config,
    stored_deepspeed,
    with_paths,
    write_run_config,
)
from launcher.run.folder import check_run_folder
from launcher.run.hardware import Hardware
from launcher.run.plain_values import dump_yaml, parse_json, parse_yaml
from launcher.run.typed_values import setting_names

QUICKSTART = (RECIPES / "quickstart.yaml").read_text()
NAMES = setting_names(run_config_of("contrastive"))


def recipe_with(tmp_path: Path, setting: str, text: str) -> Path:
    """The quickstart, with one setting as that text."""
    values = yaml.safe_load(QUICKSTART)
    *sections, key = setting.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[key] = "@@"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values).replace("'@@'", text))
    return path


def resolved(config: RunConfig, run_dir: Path) -> ResolvedRun:
    hardware = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False)
    values = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    config = dataclasses.replace(config, run_dir=str(run_dir))
    return resolve(config, values, deepspeed_name="zero3", world_size=2, hardware=hardware)


def write_run(folder: Path, *overrides: str) -> RunConfig:
    config = parse_train_arguments(overrides).config
    run = resolved(config, folder)
    folder.mkdir()
    write_run_config(run)
    return run.config


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("loss:\n  temperature: 0.07\nloss:\n  width: 0.1\n", 3, "loss"),
        ("seed: 1\nnum_steps: 3\n'seed': 2\n", 3, "seed"),
        ("data:\n  cache:\n    dir: a\n    max_gib: 1\n    dir: b\n", 5, "data.cache.dir"),
        ("data:\n  weights: {A: 1,\n    B: 2, A: 3}\n", 3, "data.weights.A"),
    ],
)
def test_a_key_given_twice_is_named_with_file_and_line(
    text: str, line: int, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"mine.yaml:{line}: {key} is given twice, first on line \d"):
        read_recipe(path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(ConfigError, match=rf"{CONFIG_FILE}:{line}: {key} is given twice"):
        read_run_config(folder)


def test_all_keys_given_twice_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nseed: 2\nloss: {width: 1, width: 2}\n")
    with pytest.raises(ConfigError, match=r"2 problems:\n.*:2: seed is given.*\n.*:3: loss.width is given"):
        read_recipe(path)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"a": {"b": [{"c": 1, "c": 2}]}}', '{"a": NaN}', "{"])
def test_json_is_as_strict(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^x.json: "):
        parse_json(text, "x.json")
    (tmp_path / DEEPSPEED_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{DEEPSPEED_FILE}: "):
        stored_deepspeed(tmp_path)


@pytest.mark.parametrize("text", ["5e-5", "'5e-5'", "5.0e-05", "0.00005"])
def test_a_learning_rate_is_read_in_every_notation(text: str, tmp_path: Path) -> None:
    assert read_recipe(recipe_with(tmp_path, "optimizer.learning_rate", text)).optimizer.learning_rate == 5e-5


WHOLE, NUMBER, BOOL = "a whole number", "a number", "true or false"
WRONG_TYPES = [
    *(
        ("num_steps", text, WHOLE)
        for text in (
            *("0644", "0x10", "0b11", "1_000", "1:30", "'800'", "800.0", "8e2", "true", "yes"),
            *("null", "", "[3]", "{}", "2026-01-01", ".inf"),
        )
    ),
    *(
        ("optimizer.learning_rate", text, NUMBER)
        for text in (
            "'0.5'",
            "1:30.5",
            "true",
            "null",
            ".nan",
            ".inf",
            "-.inf",
            "1e999",
            "'1e999'",
            "[1]",
            "0_1.5",
        )
    ),
    *(("log_samples", text, BOOL) for text in ("yes", "on", "off", "n", "1", "0", "'true'", "null", "1.0")),
    *(("name", text, "text") for text in ("123", "1.5", "true", "null", "5e-5", "[a]")),
    *(("run_dir", text, "text or null") for text in ("123", "true", "{}")),
    *(("keep_last", text, "a whole number or null") for text in ("'3'", "3.0", "true", "010")),
    *(
        ("data.caps", text, "a whole number or a mapping of names to whole numbers or null")
        for text in ("'5'", "5.0", "010", "true", "[5]")
    ),
    ("data.caps", "{A: '3'}", WHOLE),
    ("data.caps", "{A: 010}", WHOLE),
    ("data.weights", "{A: true}", NUMBER),
    ("data.weights", "{A: '1'}", NUMBER),
    ("data.weights", "[A]", "a mapping of names to numbers or null"),
    ("backbone.lora", "{rank: '4'}", WHOLE),
    ("loss.nested_dims", "8", "a list"),
    ("loss.nested_dims", "null", "a list"),
    ("loss.nested_dims", "[8, '16']", WHOLE),
    ("loss.nested_weights", "[1, true]", NUMBER),
    ("backbone.lora", "true", "a mapping or null"),
    ("backbone", "a/b", "a mapping of path"),
    ("precision", "off", "one of auto, bf16"),
    ("precision", "null", "one of auto, bf16"),
]


@pytest.mark.parametrize(("setting", "text", "expected"), WRONG_TYPES)
def test_values_are_checked_for_their_type_and_never_converted(
    setting: str, text: str, expected: str, tmp_path: Path
) -> None:
    path = recipe_with(tmp_path, setting, text)
    line = next(
        n for n, line in enumerate(path.read_text().splitlines(), 1) if setting.split(".")[-1] + ":" in line
    )
    with pytest.raises(
        ConfigError, match=rf"mine.yaml:{line}: {setting}[.\w]*: expected {expected}.*, found "
    ):
        read_recipe(path)


@pytest.mark.parametrize("text", ["yes", "off", "2026-01-01", "0644", "1:30", "1_000", "'123'", "é", "a b"])
def test_text_is_taken_as_it_is_written(text: str, tmp_path: Path) -> None:
    assert read_recipe(recipe_with(tmp_path, "name", text)).name == text.strip("'")
    weights = read_recipe(recipe_with(tmp_path, "data.weights", f"{{{text}: 1}}")).data.weights
    assert weights == {text.strip("'"): 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_every_type_of_setting_is_checked(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{name}(\.0)?: expected .*, found a list"):
        read_recipe(recipe_with(tmp_path, name, "[[]]"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected settings, `key: value` on each line, found a list"),
        ("a: [\n", r"mine.yaml:2: not YAML: "),
        ("a: \x01\n", "not YAML: "),
        ("a: !!python/object:os.system x\n", "the tag tag:yaml.org,2002:python/object:os.system"),
        ("seed: !!int '0644'\n", "seed: '0644' with the tag tag:yaml.org,2002:int is not read"),
        ("a: &x [*x]\n", "an alias of what it is part of"),
        ("? [a]\n: 1\n", "expected text as key"),
        ("a: 1\n---\nb: 2\n", "not YAML: but found another document"),
        ("", "name: missing"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


def test_unknown_and_missing_keys_are_all_named_with_near_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = QUICKSTART.replace("  learning_rate:", "  learning_rat:").replace("  chunk_size:", "  zzz:")
    path.write_text(f"{text}\nbidirectional: true\n<<: {{seed: 1}}\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    found = str(caught.value)
    assert found.startswith("5 problems:")
    assert "optimizer.learning_rat: unknown; did you mean optimizer.learning_rate" in found
    assert "optimizer.learning_rate: missing; it has no default" in found
    assert "batch.zzz: unknown; known: global_batch_size, chunk_size, max_tokens_per_chunk" in found
    assert ": bidirectional: unknown; did you mean loss.bidirectional?" in found
    assert ": <<: unknown" in found


def test_a_setting_that_moved_is_named_in_recipes_and_stored_runs(tmp_path: Path) -> None:
    """Runs stored before fusion.beta had its place."""
    message = r":\d+: loss.beta: is called fusion.beta now; rename it"
    with pytest.raises(ConfigError, match=f"mine.yaml{message}"):
        read_recipe(recipe_with(tmp_path, "loss.beta", "0.1"))
    folder = tmp_path / "run"
    config = write_run(folder)
    stored = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(stored.replace("loss:\n", "loss:\n  beta: 0.05\n"))
    for read in (lambda: read_run_config(folder), lambda: check_run_folder(resolved(config, folder))):
        with pytest.raises(ConfigError, match=f"{CONFIG_FILE}{message}"):
            read()


def test_a_setting_of_later_is_named_when_a_run_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_run(folder)
    stored = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(stored.replace("  renormalize: true\n", ""))
    assert read_run_config(folder).loss.renormalize
    with pytest.raises(ConfigError, match=r"loss.renormalize: not stored -> True"):
        check_run_folder(resolved(config, folder))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_survives_the_run_folder(recipe: str, tmp_path: Path) -> None:
    overrides = ["--recipe", recipe, "--backbone.path", str(tmp_path), "--data.shards", "s3://bucket/shards"]
    config = write_run(tmp_path / "run", *overrides)
    found = read_run_config(tmp_path / "run")
    assert type(found.loss) is type(config.loss)
    assert as_dict(found) == with_paths(as_dict(config), os.path.abspath)
    check_run_folder(resolved(found, tmp_path / "run"))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12) | st.from_regex(
    r"[-+0-9._:eExob]{1,8}", fullmatch=True
)


@given(st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT))
def test_yaml_is_read_back_equal_by_us_and_by_readers_of_yaml_1_1(values: dict[str, Any]) -> None:
    text = dump_yaml(values)
    assert parse_yaml(text, "x").values == values
    assert yaml.safe_load(text) == values
    assert [type(v) for v in parse_yaml(text, "x").values.values()] == [type(v) for v in values.values()]


# ------------------------------------------------------------------ another working folder


def test_paths_are_stored_absolute_and_a_run_is_read_and_continued_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "backbone", elsewhere):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(project)
    monkeypatch.chdir(project)
    typed = ["--backbone.path", "backbone", "--data.shards", "./shards", "--data.cache.dir", "~/cache"]
    write_run(project / "run", *typed)
    monkeypatch.chdir(elsewhere)
    stored = read_run_config(project / "run")
    assert stored.backbone.path == str(project / "backbone")
    assert stored.data.shards == str(project / "shards")
    assert stored.data.cache.dir == "~/cache"
    for backbone in ("../project/backbone", f"{tmp_path}/link/backbone/", f"{project}/backbone"):
        config = parse_train_arguments(["--backbone.path", backbone]).config
        check_run_folder(resolved(config, project / "run"))
    config = parse_train_arguments(["--backbone.path", "backbone"]).config
    with pytest.raises(ConfigError, match=f"backbone.path: {project}/backbone -> {elsewhere}/backbone"):
        check_run_folder(resolved(config, project / "run"))


@pytest.mark.parametrize("location", ["s3://bucket/a", "hf://datasets/a", "https://host/a", "gs://b/a"])
def test_a_url_stays_as_it_is(location: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "--data.shards", location, "--backbone.path", str(tmp_path))
    assert read_run_config(tmp_path / "run").data.shards == location


@pytest.mark.parametrize("text", [".inf", "-.inf", ".Inf", "+.INF", ".nan", ".NaN", ".NAN"])
def test_numbers_that_are_not_finite_are_refused_in_every_spelling(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate: expected a number, .*it must be finite"):
        read_recipe(recipe_with(tmp_path, "optimizer.learning_rate", text))


@pytest.mark.parametrize("section", ["backbone", "data"])
@pytest.mark.parametrize("value", ["null", "text", "[1]"])
def test_a_stored_section_that_is_none_is_named(section: str, value: str, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")
    path = tmp_path / "run" / CONFIG_FILE
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), section: yaml.safe_load(value)}))
    with pytest.raises(ConfigError, match=rf"belongs to another configuration: .*{section}: "):
        check_run_folder(resolved(config, tmp_path / "run"))


OLD_ZERO = {
    "stage": 3,
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


def test_a_run_of_an_older_version_is_continued_if_its_settings_are_the_same(tmp_path: Path) -> None:
    """It knows no objective, no DeepSpeed file of the recipe, and has sizes that now come from the model."""
    folder = tmp_path / "run"
    config = write_run(folder)
    values = yaml.safe_load((folder / CONFIG_FILE).read_text())
    for section, name in (("", "objective"), ("", "deepspeed"), ("batch", "keep_vision")):
        del (values[section] if section else values)[name]
    del values["batch"]["first_pass_chunks"]
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values))
    deepspeed = stored_deepspeed(folder)
    (folder / DEEPSPEED_FILE).write_text(json.dumps({**deepspeed, "zero_optimization": OLD_ZERO}))
    check_run_folder(resolved(config, folder))
    assert read_run_config(folder).objective == "contrastive"


def test_a_run_that_another_deepspeed_file_began_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = resolved(parse_train_arguments([]).config, tmp_path)
    config = dataclasses.replace(run.config, run_dir=None)
    fresh = dataclasses.replace(run, config=config, run_dir=Path("runs/quickstart-zero2"))
    check_run_folder(fresh)
    assert not caplog.messages
    Path("runs/quickstart-zero3/checkpoints").mkdir(parents=True)
    check_run_folder(fresh)
    [message] = caplog.messages
    assert "quickstart-zero2 is new and starts at step 0; runs/quickstart-zero3 holds checkpoints" in message
